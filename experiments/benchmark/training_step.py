"""The training half of a step, without an engine: seconds, tokens per second, MFU and peak memory.

    old log-probs    `score_old_log_probs`, which only off-policy GRPO needs
    GRPO update      `update_policy`, all optimizer steps on a rollout batch: gradient, clipping, AdamW
    SFT step         `compute_clipped_gradient` and AdamW

These are the functions of GRPO_train.py and SFT_train.py. MFU is the rate of useful operations (`count_work`), divided
by the best rate of a matmul in compute_dtype on the same device.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel

import GRPO_train
import SFT_train
from experiments.benchmark.figures import spread
from experiments.benchmark.gpu_figures import Measured
from experiments.benchmark.gpu_settings import GPUBenchmarkConfig, make_inputs
from experiments.benchmark.measuring import timed
from plainrl.config import GRPOConfig, SFTConfig, TrainConfig
from plainrl.data import derive_seed, epoch_order
from plainrl.devices import peak_memory_gib
from plainrl.microbatches import plan_microbatches
from plainrl.policy import compute_clipped_gradient, load_policy, prepare_training
from plainrl.prefix_tree import build_prefix_tree
from plainrl.records import Rollout, TokenizedExample
from SFT_helper import join_prompt_and_response_ids, pad_token_id

STEP = 1  # its order of rows is measured
Pairs = list[tuple[list[int], list[int]]]


class Work(NamedTuple):
    """What a step has to compute."""

    row_tokens: int  # prompts and responses
    nodes: int  # tokens without padding, shared prefixes counted once
    microbatches: int
    tflop: float  # useful operations, in units of 10^12


def measure_training(config: GPUBenchmarkConfig, sft_config: SFTConfig, peak: float) -> Iterator[Measured]:
    """Yield the figures of each part.

    Args:
        config, sft_config: the settings of both scripts, for the same model.
        peak: best rate of a matmul in compute_dtype, in TFLOP/s.
    """
    rollouts, examples = make_inputs(config)
    config = config.model_copy(update={"max_sync_error": math.inf})  # no engine sampled these responses
    device, times = config.device, config.num_repetitions
    policy, tokenizer = load_policy(config)
    optimizer, padding_id = prepare_training(policy, config), pad_token_id(tokenizer)

    score = partial(GRPO_train.score_old_log_probs, policy, rollouts, padding_id, config)
    if config.is_off_policy:
        score()  # the update needs them
    update = partial(GRPO_train.update_policy, policy, optimizer, rollouts, padding_id, STEP, config)
    work = count_update(policy, rollouts, config)
    yield Measured("GRPO update", describe(config), measure(update, work, device, times, peak))

    # After the update, so that AdamW's moments are there, as in a run.
    rows = f"{config.scoring_batch_size} rows a pass"
    work = count_scoring(policy, rollouts, config)
    yield Measured("old log-probs", rows, measure(score, work, device, times, peak))

    del policy, optimizer, score, update  # and with them AdamW's moments
    gc.collect()
    policy, _ = load_policy(sft_config)
    step = partial(take_sft_step, policy, prepare_training(policy, sft_config), examples, padding_id, sft_config)
    pairs = [(row.prompt_ids, row.response_ids) for row in examples]
    work = count_work(policy, pairs, sft_config.microbatch_size, sft_config.microbatch_tokens)
    yield Measured("SFT step", describe(sft_config), measure(step, work, device, times, peak))


def take_sft_step(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    examples: list[TokenizedExample],
    padding_id: int,
    settings: SFTConfig,
) -> None:
    """Take an optimizer step as SFT_train.py does."""
    accumulate = partial(SFT_train.accumulate_gradients, policy, examples, padding_id, settings)
    compute_clipped_gradient(policy, accumulate, settings)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def describe(settings: TrainConfig) -> str:
    """Return what tells variants of training apart.

    >>> describe(SFTConfig(microbatch_tokens=4096, compute_dtype="bfloat16", gradient_checkpointing=True))
    'microbatches of 4096 tokens, bfloat16, checkpointing'
    """
    limit = settings.microbatch_tokens
    parts = {
        f"microbatches of {f'{limit} tokens' if limit else f'{settings.microbatch_size} rows'}": True,
        settings.compute_dtype: True,
        "checkpointing": settings.gradient_checkpointing,
        "compiled": settings.compile_policy,
        f"adapters of rank {settings.lora_rank}": bool(settings.lora_rank),
    }
    return ", ".join(part for part, is_on in parts.items() if is_on)


def count_scoring(policy: PreTrainedModel, rollouts: Sequence[Rollout], config: GRPOConfig) -> Work:
    """Count the work of scoring all rollouts once."""
    return count_work(policy, pairs_of(rollouts), config.scoring_batch_size, 0, is_training=False)


def count_update(policy: PreTrainedModel, rollouts: Sequence[Rollout], config: GRPOConfig) -> Work:
    """Count the work of all optimizer steps on a rollout batch, which `update_policy` divides in the same way."""
    works = []
    for epoch in range(config.epochs_per_rollout_batch):
        order = epoch_order(len(rollouts), len(rollouts), derive_seed(config.seed, "batches", STEP, epoch))
        for start in range(0, len(rollouts), config.train_batch_size):
            batch = [rollouts[index] for index in order[start : start + config.train_batch_size]]
            trained, _ = GRPO_train.rows_to_train_on(batch, config)
            works.append(count_work(policy, pairs_of(trained), config.microbatch_size, config.microbatch_tokens))
    return Work(*map(sum, zip(*works, strict=True)))  # pyright: ignore[reportArgumentType]


def pairs_of(rollouts: Sequence[Rollout]) -> Pairs:
    """Return prompt and response of each rollout, as token ids."""
    return [(row.response.prompt_ids, row.response.token_ids) for row in rollouts]


def count_work(policy: PreTrainedModel, pairs: Pairs, max_rows: int, max_tokens: int, is_training: bool = True) -> Work:
    """Count the useful operations on (prompt, response) rows. Nothing counts that is computed a second time.

        F = (2 n W + 2 r d V) (1 + b) + 4 L d s (1 + c)

    n nodes, W weights in the L blocks' matmuls, d width of the model and of all its heads, s pairs of a node and one
    that it sees, r response tokens, V vocabulary. Scoring has no backward pass: b = c = 0. In training c = 2, and so is
    b. But frozen weights have no gradient of their own: with adapters b = 1, and the adapters do not count. A prefix
    that rows of a microbatch share counts once.
    """
    config = cast(Any, policy.config)
    width, num_layers = config.hidden_size, config.num_hidden_layers
    kv_width = width * config.num_key_value_heads // config.num_attention_heads
    weights = num_layers * width * (2 * width + 2 * kv_width + 3 * config.intermediate_size)
    prompts, responses = [prompt for prompt, _ in pairs], [response for _, response in pairs]
    plan = plan_microbatches(prompts, responses, max_rows, max_tokens)
    nodes = seen = 0
    for part in plan:
        rows = part.indices
        batch = join_prompt_and_response_ids([prompts[i] for i in rows], [responses[i] for i in rows], 0)
        tree = build_prefix_tree(batch["input_ids"], batch["response_mask"])
        nodes += tree.token_ids.numel()
        seen += int((tree.positions + 1).sum())
    by_weights = 2 * nodes * weights + 2 * sum(map(len, responses)) * width * config.vocab_size
    is_frozen = not all(parameter.requires_grad for parameter in policy.parameters())
    of_weights, of_attention = (2 - is_frozen, 2) if is_training else (0, 0)
    flop = by_weights * (1 + of_weights) + 4 * num_layers * width * seen * (1 + of_attention)
    return Work(sum(map(len, prompts)) + sum(map(len, responses)), nodes, len(plan), flop / 1e12)


def measure(action: Callable[[], object], work: Work, device: str, num_repetitions: int, peak: float) -> dict[str, Any]:
    """Return the seconds of an action after one to warm up, its rates, and its peak memory."""
    figures: dict[str, Any] = {"warm_up_seconds": timed(action, device)}
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    figures |= spread_of([timed(action, device) for _ in range(num_repetitions)])
    figures |= {"row_tokens": work.row_tokens, "nodes": work.nodes, "microbatches": work.microbatches}
    figures |= {"useful_tflop": work.tflop, "tokens_per_second": work.row_tokens / figures["seconds"]}
    figures |= {"mfu": work.tflop / figures["seconds"] / peak, "peak_gib": peak_memory_gib(device)}
    if device != "cpu":
        figures["peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return figures


def spread_of(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median of repetitions, the fastest, the slowest, and their number.

    >>> spread_of([3.0, 1.0, 2.5])
    {'seconds': 2.5, 'fastest_seconds': 1.0, 'slowest_seconds': 3.0, 'repetitions': 3}
    """
    fastest, median, slowest = spread(seconds)
    return {"seconds": median, "fastest_seconds": fastest, "slowest_seconds": slowest, "repetitions": len(seconds)}
