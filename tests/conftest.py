"""A tiny random model with tied embeddings, its tokenizer, and a real vLLM engine that runs it on the CPU."""

import os
import signal

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads only slow a tiny model down
# Whoever imports the helpers from here on gets them with their annotated shapes and dtypes checked.
install_import_hook(["SFT_helper", "GRPO_helper"], "beartype.beartype")


def pytest_configure():
    """Ignore no signal, though the tests may run under nohup or in a script's background: scripts inherit that."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> str:
    """A Llama of 2 layers, width 64, with a byte-level BPE trained on the embedded data."""
    from tiny import make_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def answering_model_folder(tmp_path_factory, tiny_model_folder) -> str:
    """The same model after it has learnt to guess a digit in the format of r1_zero."""
    from tiny import make_answering_model

    folder = tmp_path_factory.mktemp("models") / "answering"
    make_answering_model(folder, tiny_model_folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_model_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture
def tiny_model(tiny_model_folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def engine(tiny_model_folder):
    """One float32 engine for all tests; a test that changes its weights puts them in by itself."""
    from policy_evaluation import init_vllm

    return init_vllm(tiny_model_folder, "cpu", seed=0, dtype="float32", max_model_len=512)
