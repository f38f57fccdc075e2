"""The models and the engine of the GPU check, and one line of JSON per case, where GPU_CHECK_JSONL names a file."""

import json
import os

import pytest
import torch
from small_qwen import DEVICE, ON_GPU, load, make_batch, save_model, score_row_by_row

from plainrl.devices import can_compile, check_engine_device
from plainrl.engine import init_vllm
from plainrl.records import UserError


def pytest_runtest_logreport(report):
    """Write how a case ended as soon as it has ended, with what it recorded."""
    path = os.environ.get("GPU_CHECK_JSONL")
    if not path or (report.when != "call" and report.outcome == "passed"):
        return
    row = {"case": report.nodeid.rpartition("::")[2], "outcome": report.outcome, "seconds": report.duration}
    row |= dict(report.user_properties)
    if report.outcome == "skipped":
        row["why"] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.outcome == "failed":
        row["why"] = report.longreprtext[-600:]
    with open(path, "a") as file:
        print(json.dumps(row, default=str), file=file)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory, tokenizer):
    """A random Qwen2, with the tokenizer of the tiny model."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    save_model(folder, tokenizer)
    return str(folder)


@pytest.fixture
def policy(qwen_folder):
    """The model in float32, and its working copy in bfloat16."""
    return load(qwen_folder, compute_dtype="bfloat16")


@pytest.fixture(scope="session")
def reference(qwen_folder):
    """Scores and gradients in float64 on the CPU, row by row, and the weights of the sum that has these gradients."""
    plain = load(qwen_folder, "cpu", torch.float64, sharing=False)
    expected = score_row_by_row(plain, make_batch())
    weights = torch.linspace(-1, 1, len(expected))[:, None]
    (expected * weights).sum().backward()
    return (expected.detach(), [parameter.grad for parameter in plain.parameters()]), weights


@pytest.fixture(scope="session")
def needs_engine():
    try:
        check_engine_device(DEVICE)
    except UserError as error:
        pytest.skip(str(error))
    if ON_GPU and not can_compile(DEVICE):
        pytest.skip("vLLM's sampler needs a compiler: gcc or clang, and Python's headers")


@pytest.fixture(scope="session")
def gpu_engine(needs_engine, qwen_folder):
    """The engine as in preset one-gpu: compiled, with CUDA graphs, and it can sleep. A process can have one only."""
    return init_vllm(
        qwen_folder,
        DEVICE,
        seed=0,
        gpu_memory_utilization=0.2,
        dtype="bfloat16",
        max_model_len=1024,
        enforce_eager=not ON_GPU,
        enable_sleep_mode=ON_GPU,
    )
