"""One rank on one GPU: torchrun changes nothing, and FSDP2 over NCCL computes the same gradients. No case needs an
engine. Two ranks are tried on the CPU alone, by tests/test_distributed.py."""

import math

import pytest
import torch
import torch.distributed as dist
from kill_and_resume import find_differences, start
from small_qwen import DEVICE, GPU_CHECK, LIMITS, ON_GPU, load, load_as_a_run, make_examples, norm
from tiny import tiny_arguments, train_rows

import SFT_train
from plainrl.distributed import divide_weights, local, whole

pytestmark = GPU_CHECK
NEVER = "0"  # the step in which train_without_engine.py kills itself


@pytest.fixture
def ranks_of_one():
    """A process group of this process alone, as `join` makes it for several. An engine here has made one already."""
    if dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_of_torchrun_is_no_torchrun(tiny_model_folder, tmp_path, record_property):
    """On a CPU bit for bit. A GPU adds in another order, so it comes close."""
    processes = []
    for name, num_ranks in (("alone", 0), ("by_torchrun", 1)):
        settings = {"run_name": name, "policy_device": DEVICE, "keep_best": False}
        arguments = [NEVER, *tiny_arguments(tiny_model_folder, tmp_path, **settings)]
        script, log = "tests/gpu/train_without_engine.py", tmp_path / f"{name}.log"
        processes.append((start(script, arguments, log, num_ranks=num_ranks), log))
    try:
        for process, log in processes:
            assert process.wait(timeout=1800) == 0, log.read_text()[-3000:]
    finally:
        for process, _ in processes:
            process.kill()
    folders = [tmp_path / name for name in ("alone", "by_torchrun")]
    losses = [[row["train/loss"] for row in train_rows(folder)] for folder in folders]
    record_property("losses", losses)
    assert len(losses[0]) == 3
    if ON_GPU:
        assert all(math.isclose(one, other, rel_tol=0.01) for one, other in zip(*losses, strict=True))
    else:
        assert find_differences(*folders) == ["samples/* differ"]  # without an engine, neither run has samples


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_divided_over_one_rank_has_the_same_gradients(qwen_folder, dtype, ranks_of_one, record_property):
    policy, config = load_as_a_run(qwen_folder, compute_dtype=dtype, normalize_constant=100.0)
    divided = load(qwen_folder)
    divide_weights(divided, DEVICE, dtype)
    losses, gradients = [], []
    for model in (policy, divided):
        metrics = SFT_train.accumulate_gradients(model.train(), make_examples(), 0, config)
        losses.append(metrics["train/loss"])
        gradients.append([whole(parameter.grad) for parameter in model.parameters()])
    assert all(hasattr(parameter, "placements") for parameter in divided.parameters())
    assert sum(local(parameter).numel() for parameter in divided.parameters()) == sum(g.numel() for g in gradients[0])
    error = norm(one - other for one, other in zip(*gradients, strict=True)) / norm(gradients[0])
    record_property("gradient_error", error)
    assert torch.tensor(norm(gradients[0])) > 0
    assert error < (1e-6 if dtype == "float32" else LIMITS[dtype][1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if dtype == "float32" else 1e-2)
