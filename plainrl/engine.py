"""The vLLM engine: start it, load the policy's weights, check that it is the policy, sample, sleep.

Training updates the policy (Transformers) and samples from a copy of it (vLLM). `load_policy_into_vllm_instance` copies
the weights. `check_policy_sync` scores freshly sampled tokens with both and compares the results.

Importing this module imports neither vLLM nor wandb and starts no CUDA context.
"""

import contextlib
import json
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel

from plainrl.config import RunConfig
from plainrl.devices import can_compile, check_engine_device
from plainrl.distributed import deal, engine_number, exchange, gather, is_lost_rank, whole
from plainrl.engine_process import load_by_file, new_processes, share_threads, told_if_it_ended, watch
from plainrl.lora import merged_state_dict
from plainrl.policy import score_responses
from plainrl.processor import fast_dtype
from plainrl.records import Response, UserError, one_line

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams
    from vllm.logprobs import FlatLogprobs

# vLLM's level while it starts, and afterwards. On a GPU its start takes minutes, in which it says what it does.
LOG_LEVELS = {"cpu": ("ERROR", "ERROR"), "cuda": ("INFO", "WARNING")}
CPU_OPTIONS = {
    "block_size": 32,  # with the default of 128, a prompt as short as r1_zero's would never be cached
    "enable_chunked_prefill": False,  # fails with seeds: the CPU's generator has no offset (vLLM 0.32)
}
OPTIONS_OF_RANKS = {
    "distributed_executor_backend": "external_launcher",  # torchrun has started the processes already
    "disable_custom_all_reduce": True,  # it asks for the other ranks' GPUs, which this one does not see
}


class SyncError(UserError):
    """The engine's log-probabilities differ from the policy's, so that it samples from another model."""


def init_vllm(
    model_id: str,
    device: str,
    seed: int,
    gpu_memory_utilization: float = 0.85,
    *,
    dtype: str | None = None,
    max_model_len: int | None = None,
    cpu_cache_gib: int = 1,
    enforce_eager: bool = True,
    enable_sleep_mode: bool = False,
    float32_output_layer: bool = False,
    tensor_parallel_size: int = 1,
    in_own_process: bool = False,
) -> "LLM":
    """Start a vLLM engine, by default in this process. Print what starts, how long it took, and what its cache holds.

    Args:
        model_id: a local folder in Transformers format.
        device: `cpu` or `cuda:0`. In one process vLLM takes the first visible GPU.
        seed: seed of the engine's own sampling. Requests carry their own.
        gpu_memory_utilization: share of the GPU's memory for weights and cache.
        dtype: dtype of weights and cache. None: bfloat16, on a CPU without AVX-512 float32.
        max_model_len: longest prompt plus response, in tokens.
        cpu_cache_gib: size of the key-value cache on the CPU, in GiB.
        enforce_eager: whether the engine runs without compiling.
        enable_sleep_mode: whether `LLM.sleep` is possible, which a GPU shared with the policy needs.
        float32_output_layer: whether logits are computed in float32, from weights and hidden states in `dtype`.
        tensor_parallel_size: number of ranks that share the engine. Each of them starts its part of it.
        in_own_process: whether it gets a process of its own. On a CPU that takes half of this process's threads.

    The engine reseeds this process's global random state. A caller that relies on that state must seed it afterwards.

    Raises:
        UserError: the installed vLLM cannot run on the device, or vLLM refuses the settings.
    """
    check_engine_device(device)
    options = {
        "model": model_id,
        "dtype": dtype or fast_dtype(device),
        "seed": seed,
        "max_model_len": max_model_len,
        "gpu_memory_utilization": gpu_memory_utilization,
        "enforce_eager": enforce_eager,
        "enable_sleep_mode": enable_sleep_mode,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "hf_overrides": {"head_dtype": "float32"} if float32_output_layer else {},
    }
    if tensor_parallel_size > 1:
        options |= {"tensor_parallel_size": tensor_parallel_size} | OPTIONS_OF_RANKS
    if device == "cpu":
        sizes = {"max_num_batched_tokens": max(4096, max_model_len or 0)}
        options |= CPU_OPTIONS | sizes | {"kv_cache_memory_bytes": cpu_cache_gib * 2**30}
    if in_own_process:
        options["use_tqdm_on_load"] = False  # a bar at each copy of the weights
    return _start_and_tell(device, options, in_own_process)


def engine_settings(config: RunConfig) -> dict[str, Any]:
    """Return what a configuration says of the engine, as arguments of `init_vllm`."""
    return {
        "device": config.evaluator_device,
        "seed": config.seed,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "dtype": config.engine_dtype,
        "max_model_len": config.max_context_tokens,
        "cpu_cache_gib": config.engine_cache_gib,
        "enforce_eager": config.engine_eager,
        "float32_output_layer": config.float32_output_layer,
        "tensor_parallel_size": config.engine_tensor_parallel,
        "in_own_process": config.samples_ahead,
    }


def describe_cache(llm: "LLM") -> str:
    """Return how large the engine's key-value cache is: in tokens, in contexts of full length, and in GiB if known."""
    config, size = llm.llm_engine.vllm_config, ""
    if not is_in_own_process(llm):
        core = cast(Any, llm.llm_engine.engine_core).engine_core
        gib = sum(tensor.size for tensor in core.scheduler.kv_cache_config.kv_cache_tensors) / 2**30
        size = f" of {gib:.1f} GiB"
    return (
        f"its key-value cache{size} holds {config.cache_config.kv_cache_size_tokens:,} tokens, enough for "
        f"{config.cache_config.kv_cache_max_concurrency:,.1f} contexts of {config.model_config.max_model_len:,} tokens"
    )


def is_in_own_process(llm: "LLM") -> bool:
    """Return whether the engine has a process of its own, which has neither this one's memory nor its tensors."""
    return not hasattr(llm.llm_engine.engine_core, "engine_core")


def load_policy_into_vllm_instance(policy: PreTrainedModel, llm: "LLM") -> None:
    """Copy the policy's weights into the engine, adapters merged, and wake it up first if it sleeps.

    The engine's loader needs `state_dict()`. `named_parameters()` lacks the tied output layer, which would silently
    keep its old weights. The prefix cache is reset, because its keys and values belong to the old weights.

    Raises:
        SyncError: the engine does not reset its prefix cache.
    """
    dtype = llm.llm_engine.vllm_config.model_config.dtype
    weights = ((name, whole(tensor.detach().to(dtype))) for name, tensor in merged_state_dict(policy))
    with told_if_it_ended():
        is_sleeping = llm.llm_engine.is_sleeping()
        if is_sleeping:
            torch.cuda.empty_cache()  # the engine cannot use memory that torch's allocator keeps
            llm.wake_up(tags=["weights"])
        with _quiet_stderr():
            if is_in_own_process(llm):
                load_by_file(llm, weights)
            else:
                llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if is_sleeping:
            llm.wake_up(tags=["kv_cache"])
        is_reset = llm.reset_prefix_cache()
    if not is_reset:
        raise SyncError("vLLM kept keys and values of the old weights; finish all requests before weights change")


def sleep_vllm_instance(llm: "LLM") -> None:
    """Free the engine's GPU memory for training. The next weight sync wakes the engine up."""
    llm.sleep(level=2)


def sampling_params(config: RunConfig) -> "SamplingParams":
    """Return the sampling settings of a configuration."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=config.sampling_temperature,
        top_p=config.sampling_top_p,
        min_tokens=config.sampling_min_tokens,
        max_tokens=config.sampling_max_tokens,
        stop=[config.stop_string] if config.stop_string else None,
        include_stop_str_in_output=True,
    )


def sample_responses(
    llm: "LLM",
    prompt_ids: Sequence[list[int]],
    sampling_params: "SamplingParams",
    seeds: Sequence[int],
    with_log_probs: bool = True,
) -> list[Response]:
    """Sample one response per prompt, in the order given. The prompts are divided over the engines of all ranks.

    Args:
        llm: the engine.
        prompt_ids: token ids of each prompt.
        sampling_params: shared by all requests, except for the seed.
        seeds: one seed per prompt.
        with_log_probs: whether the responses get the log-probs of their tokens. They take processor time, so that
            evaluations, which never read them, leave them out.
    """
    own_ids, own_seeds = deal(prompt_ids), deal(seeds)
    finished = dict(stream_responses(llm, own_ids, sampling_params, own_seeds, with_log_probs))
    return gather([finished[index] for index in range(len(own_ids))])


def stream_responses(
    llm: "LLM",
    prompt_ids: Sequence[list[int]],
    sampling_params: "SamplingParams",
    seeds: Sequence[int],
    with_log_probs: bool = True,
) -> Iterator[tuple[int, Response]]:
    """Sample like `sample_responses`, with this rank's engine, and yield each response with its index when finished."""
    yield from collect(llm, submit(llm, prompt_ids, sampling_params, seeds, with_log_probs))


class Submitted(NamedTuple):
    """Requests that an engine has got: the index of each by its number, and their prompts."""

    indices: dict[str, int]
    prompt_ids: Sequence[list[int]]


def submit(
    llm: "LLM",
    prompt_ids: Sequence[list[int]],
    sampling_params: "SamplingParams",
    seeds: Sequence[int],
    with_log_probs: bool = True,
) -> Submitted:
    """Give requests to the engine. One in a process of its own begins with them at once, any other in `collect`.

    Args: as for `sample_responses`.
    """
    requests = []
    for seed in seeds:
        request = sampling_params.clone()
        request.seed = seed
        request.logprobs = 0 if with_log_probs else None  # 0: those of the sampled tokens only
        request.flat_logprobs = True  # in one list, without objects for each token
        requests.append(request)
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in prompt_ids]
    with told_if_it_ended():
        request_ids = llm.enqueue(prompts, requests, use_tqdm=False)
    if with_log_probs:
        states = llm.llm_engine.output_processor.request_states
        for request_id in request_ids:  # vLLM would decode each token by itself, for texts that nobody reads
            cast(Any, states[request_id].logprobs_processor).tokenizer = None
    indices = {request_id.partition("-")[0]: index for index, request_id in enumerate(request_ids)}
    return Submitted(indices, prompt_ids)


def collect(llm: "LLM", submitted: Submitted) -> Iterator[tuple[int, Response]]:
    """Wait for all responses to requests, and yield each with its index when it is finished."""
    while llm.llm_engine.has_unfinished_requests():
        with told_if_it_ended():
            outputs = llm.llm_engine.step()
        for output in outputs:
            if output.finished:
                index = submitted.indices[output.request_id]
                prompt_ids = submitted.prompt_ids[index]
                yield index, _to_response(prompt_ids, cast("RequestOutput", output).outputs[0])


def check_policy_sync(
    policy: PreTrainedModel,
    llm: "LLM",
    prompt_ids: Sequence[list[int]],
    padding_id: int,
    num_tokens: int,
    max_error: float,
) -> dict[str, float]:
    """Check that the engine samples from the policy: score freshly sampled tokens with both.

        error = exp( mean_t | log p_engine(y_t) - log p_policy(y_t) | )

    Args:
        policy: the policy, whose weights were copied.
        llm: the engine.
        prompt_ids: token ids of the probe prompts. They are the same each time, so that the check also finds keys and
            values of earlier weights in the prefix cache.
        padding_id: token id that fills rows up.
        num_tokens: tokens sampled per prompt, at temperature 1.
        max_error: the limit. Rounding alone gives about 1.00001 in float32 and 1.04 in bfloat16. The check cannot
            distinguish a smaller difference between two models from rounding.

    Returns:
        `sync_multiplicative_error`, the error above, and `sync_max_log_prob_difference`, in nats.

    Raises:
        UserError: the policy's log-probs are infinite or NaN.
        SyncError: the error exceeds the limit, or is NaN.
    """
    from vllm import SamplingParams

    # No min_tokens here: it would forbid EOS, and the engine's distribution would no longer be the policy's.
    params = SamplingParams(temperature=1.0, max_tokens=num_tokens, ignore_eos=True)
    # Not divided: every engine samples all probes, for each has to have got the weights.
    finished = dict(stream_responses(llm, prompt_ids, params, range(len(prompt_ids))))
    by_rank = exchange([finished[index] for index in range(len(prompt_ids))])
    scores = score_responses(policy, [r for part in by_rank for r in part], padding_id, len(prompt_ids))
    of_policy = torch.cat([score["log_probs"] for score in scores])
    if not of_policy.isfinite().all():
        raise UserError(
            "the policy's log-probs of sampled tokens are infinite or NaN: its weights are damaged, or its numbers "
            "overflow; go back to an earlier checkpoint, lower learning_rate, or use compute_dtype = bfloat16"
        )
    of_engines = torch.tensor([value for part in by_rank for response in part for value in response.log_probs])
    difference = (of_engines - of_policy).abs()
    errors = [part.mean().exp().item() for part in difference.chunk(len(by_rank))]
    for number, error in enumerate(errors):
        require_small_sync_error(error, max_error, f"the engine of rank {number}" if len(errors) > 1 else "engine")
    error = max(errors)
    return {"sync_multiplicative_error": error, "sync_max_log_prob_difference": difference.max().item()}


def require_small_sync_error(error: float, max_error: float, engine: str = "engine") -> None:
    """Raise a SyncError if exp(mean |engine - policy log-prob|) of sampled tokens is NaN or over its limit."""
    if not error <= max_error:
        causes = (
            "the engine's log-probs are NaN, as when numbers overflow: use engine_dtype = bfloat16 or float32"
            if math.isnan(error)
            else "look for weights that did not arrive (tied output layer, renamed tensors), a prefix cache that was "
            "not reset, or an engine_dtype coarser than the limit allows"
        )
        raise SyncError(
            f"after the weight sync, {engine} and policy disagree on sampled tokens by a factor of {error:.4f} "
            f"(max_sync_error = {max_error}): {causes}"
        )


def register_model_class(folder: str) -> None:
    """Import the class of a model, and name it to vLLM.

    Otherwise vLLM imports itself in a second process on its first start, only to look at the class. It wants to keep
    CUDA out of this process, which does not matter on a CPU.

    Args:
        folder: the model's folder. A class that vLLM does not know or cannot import is left to its own error.
    """
    from vllm import ModelRegistry

    for architecture in json.loads((Path(folder) / "config.json").read_text()).get("architectures") or []:
        if architecture not in ModelRegistry.models:
            continue
        with contextlib.suppress(ImportError):
            ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def _start_and_tell(device: str, options: dict[str, Any], in_own_process: bool = False) -> "LLM":
    notes = {
        f"starting vLLM on {device}: {options['model']} in {options['dtype']}": True,
        "in a process of its own": in_own_process,
        "the first start compiles, which takes minutes": not options["enforce_eager"],
        "vLLM's own messages follow": device != "cpu" and not in_own_process,
    }
    print("; ".join(note for note, holds in notes.items() if holds), flush=True)
    started, present = time.perf_counter(), multiprocessing.active_children()
    with share_threads(device) if in_own_process else contextlib.nullcontext():
        llm = _start_vllm(device, options, in_own_process)
    if in_own_process:
        watch(new_processes(present))
    print(f"vLLM started in {time.perf_counter() - started:.0f} s; {describe_cache(llm)}", flush=True)
    return llm


def _start_vllm(device: str, options: dict[str, Any], in_own_process: bool = False) -> "LLM":
    # In this process the engine receives the weights as they are.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(in_own_process))
    starting_level, running_level = LOG_LEVELS[device.partition(":")[0]]
    if in_own_process:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork would inherit threads and locks
        starting_level = "ERROR"  # it keeps its level, and would write over the progress bar at each step
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM must not bind torch's threads to cores
    is_level_ours = "VLLM_LOGGING_LEVEL" not in os.environ  # else the user's own level holds throughout
    os.environ.setdefault("VLLM_LOGGING_LEVEL", starting_level)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with _quiet_stderr() if device == "cpu" else contextlib.nullcontext():
        from vllm.platforms import current_platform

        if device == "cpu":
            if not can_compile("cpu"):  # even eager vLLM compiles a helper of its sampler
                type(current_platform).simple_compile_backend = "eager"
            register_model_class(options["model"])

        from vllm import LLM

        # On a GPU: AssertionError where memory is short, RuntimeError where Triton cannot compile or a process ended.
        is_known = device == "cpu" and not in_own_process
        refusals = ValueError if is_known else (ValueError, RuntimeError, AssertionError)
        try:
            llm = LLM(**options)
        except refusals as error:  # the settings do not fit this model or this device's memory
            if is_lost_rank(error):
                raise  # on a GPU vLLM's warm-up waits for all ranks, and the lost one says why it has ended
            if not isinstance(error, ValueError):  # these may be bugs, too
                traceback.print_exc()
            raise UserError(
                f"vLLM did not start on {device} ({one_line(error)}); look at gpu_memory_utilization, "
                "engine_cache_gib, max_context_tokens and engine_dtype, or use a model that vLLM supports"
            ) from error
    if is_level_ours:
        logging.getLogger("vllm").setLevel(running_level)
        logging.getLogger("vllm.model_executor.model_loader.reload").setLevel("ERROR")  # a false alarm at each sync
    return llm


def _to_response(prompt_ids: list[int], completion: "CompletionOutput") -> Response:
    token_ids = list(completion.token_ids)
    log_probs = []
    if completion.logprobs is not None:
        found = cast("FlatLogprobs", completion.logprobs)
        assert found.token_ids == token_ids, "vLLM's log-probs are of other tokens"
        log_probs = found.logprobs
    finish_reason = str(completion.finish_reason)
    return Response(list(prompt_ids), completion.text, token_ids, log_probs, finish_reason, engine_number())


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hold back what native code and progress bars print to stderr. Show it if something fails."""

    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile(mode="w+b") as buffer:
        os.dup2(buffer.fileno(), 2)
        try:
            yield
        except BaseException:
            buffer.seek(0)
            os.write(saved, buffer.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
