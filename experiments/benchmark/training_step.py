"""The training half of a step, without an engine: seconds, tokens per second, MFU and peak memory.

    uv run --no-sync python -m experiments.benchmark.training_step [device=cuda:0] [key=value ...]

The model has the shape of Qwen2.5-Math-1.5B and random weights. Rollouts and traces are random tokens of stated
lengths. So nothing is downloaded. What is timed are the functions of GRPO_train.py and SFT_train.py:

    GRPO update      `update_policy`, one optimizer step on all rollouts: gradient, clipping, AdamW
    old log-probs    `score_old_log_probs`, which only off-policy GRPO needs
    SFT step         `compute_clipped_gradient` and AdamW

The settings are those of the preset, `one-gpu` unless another is given. Updates and SFT steps are then measured with
large microbatches and gradient checkpointing. All keys of GRPO_train.py are known; `--help` lists them. The learning
rate is nearly zero, so that every repetition has the same work. What is measured is written at once.

MFU is the rate of useful operations (`count_work`), divided by the best rate of a bfloat16 matmul on the same device.
"""

import gc
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from pydantic import Field
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

import GRPO_train
import SFT_train
from experiments.benchmark.measuring import matmul_peak, timed
from experiments.benchmark.random_model import QWEN_SHAPE
from experiments.benchmark.settings import REPOSITORY
from plainrl.cli import load_config, run_main
from plainrl.config import GRPOConfig, SFTConfig, TrainConfig
from plainrl.devices import peak_memory_gib
from plainrl.microbatches import plan_microbatches
from plainrl.policy import choose_attention, compute_clipped_gradient, prepare_training
from plainrl.prefix_tree import build_prefix_tree, share_prefixes
from plainrl.records import Example, Response, Rollout, TokenizedExample, UserError
from plainrl.run_records import describe_environment
from SFT_helper import join_prompt_and_response_ids

TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
SHAPES = {"qwen2.5-math-1.5b": QWEN_SHAPE, "tiny": Qwen2Config.from_dict(TINY)}
KEYS_OF_BOTH = ("preset", "compute_dtype", "attn_implementation", "compile_policy")  # given once, for GRPO and SFT
NOTHING = Example("", "", None, None, "")
Length = tuple[int, int, int]
AnyTrainConfig = TypeVar("AnyTrainConfig", bound=TrainConfig)
HEADER = """
| part | tokens per microbatch (0: no limit) | rows at most | checkpointing | seconds | tokens/s | MFU | peak GiB |
|---|---|---|---|---|---|---|---|"""
LINE = (
    "| {part} | {microbatch_tokens:,} | {microbatch_rows} | {gradient_checkpointing} | {seconds:.3g} "
    "| {tokens_per_second:,.0f} | {mfu:.1%} | {peak_gib:.1f} |"
)


class TrainingStepConfig(GRPOConfig):
    """The keys of GRPO_train.py, and those of this benchmark."""

    device: str = Field("cuda:0", pattern=r"^(cpu|cuda:\d+)$", description="what is measured: cpu or cuda:N")
    shape: Literal["qwen2.5-math-1.5b", "tiny"] = Field("qwen2.5-math-1.5b", description="shape of the model")
    num_repetitions: int = Field(3, ge=1, description="timed repetitions, after one to warm up. Their median counts")
    large_microbatch_tokens: int = Field(16384, ge=1, description="tokens of the large microbatches")
    advantage_fraction: float = Field(0.6, gt=0, le=1, description="share of the groups that have an advantage")
    template_tokens: int = Field(100, ge=0, description="prompt tokens that all rows share")
    question_tokens: tuple[int, int] = Field((20, 80), description="further prompt tokens: fewest, most")
    response_tokens: Length = Field((100, 400, 1024), description="tokens of a rollout: fewest, mean, most")
    trace_tokens: Length = Field((100, 600, 2500), description="tokens of an SFT response: fewest, mean, most")
    sft_batch_size: int = Field(128, ge=1, description="examples of an SFT step")
    results: str = Field("runs/training_step.jsonl", description="file of the lines of JSON, written anew")


class Work(NamedTuple):
    """What a step has to compute."""

    row_tokens: int  # prompts and responses
    nodes: int  # tokens without padding, shared prefixes counted once
    microbatches: int
    tflop: float  # useful operations, in units of 10^12


def main(arguments: list[str]) -> None:
    """Measure each part; write its line of JSON and print its line of the table at once."""
    config, sft_config = load_settings(arguments)
    policy = make_policy(config)
    num_tries = 1 if config.device == "cpu" else 5  # the first ones let a GPU reach its clock
    peak = max(matmul_peak(config.device) for _ in range(num_tries))
    Path(config.results).parent.mkdir(parents=True, exist_ok=True)
    with Path(config.results).open("w") as file:
        print(json.dumps(describe(policy, peak, config)), file=file, flush=True)
        print(f"bfloat16 matmul: {peak:.1f} TFLOP/s\n{HEADER}", flush=True)
        for row in measure_all(policy, *make_inputs(config), config, sft_config):
            row["mfu"] = row["tflop"] / row["seconds"] / peak
            print(json.dumps(row), file=file, flush=True)
            print(LINE.format(**row), flush=True)


def load_settings(arguments: list[str]) -> tuple[TrainingStepConfig, SFTConfig]:
    """Return the settings of both scripts for the preset, `one-gpu` unless another is given, on the device."""
    if not any(argument.startswith(("preset=", "--help")) for argument in arguments):
        arguments = ["preset=one-gpu", *arguments]
    config = load_config(TrainingStepConfig, REPOSITORY / "grpo_train.yaml", arguments)
    if config.device != "cpu" and int(config.device.removeprefix("cuda:")) >= torch.cuda.device_count():
        raise UserError(f"device = {config.device}: there is no such device; run where the GPU is, or use device=cpu")
    of_both = [argument for argument in arguments if argument.partition("=")[0] in KEYS_OF_BOTH]
    sft_config = load_config(SFTConfig, REPOSITORY / "config.yaml", of_both)
    update: dict[str, Any] = {"policy_device": config.device, "learning_rate": 1e-12}
    sft_config = sft_config.model_copy(update=update | {"train_batch_size": config.sft_batch_size})
    update |= {"train_batch_size": config.rollout_batch_size, "epochs_per_rollout_batch": 1}
    return config.model_copy(update=update | {"max_sync_error": math.inf}), sft_config  # no engine sampled anything


def make_policy(config: TrainingStepConfig) -> PreTrainedModel:
    """Return a random policy on the device, prepared as `load_policy` does."""
    torch.manual_seed(0)
    if config.device != "cpu":
        torch.cuda.set_device(config.device)
        torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.device(config.device):
        policy = AutoModelForCausalLM.from_config(
            SHAPES[config.shape], dtype=torch.float32, attn_implementation=choose_attention(config)
        )
    share_prefixes(policy)
    return policy


def make_inputs(config: TrainingStepConfig) -> tuple[list[Rollout], list[TokenizedExample]]:
    """Return made-up rollouts and SFT examples. The first groups have advantages +1 and -1 in turn, the others 0."""
    generator = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(5, SHAPES[config.shape].vocab_size) for _ in range(count)]

    template = tokens(config.template_tokens)
    lengths = draw_lengths(generator, config.rollout_batch_size, config.response_tokens)
    num_questions = config.num_questions_per_step
    prompts = [template + tokens(generator.randint(*config.question_tokens)) for _ in range(num_questions)]
    rollouts = []
    for index, length in enumerate(lengths):
        question, reward = index // config.group_size, 1.0 - index % config.group_size % 2
        has_advantage = question < round(config.advantage_fraction * num_questions)
        response = Response(prompts[question], "", tokens(length), [0.0] * length, "stop")
        rollouts.append(Rollout(NOTHING, response, {"reward": reward}, (2 * reward - 1) * has_advantage))
    examples = [
        TokenizedExample(NOTHING, template + tokens(generator.randint(*config.question_tokens)), tokens(length))
        for length in draw_lengths(generator, config.sft_batch_size, config.trace_tokens)
    ]
    return rollouts, examples


def draw_lengths(generator: random.Random, count: int, limits: Length) -> list[int]:
    """Return log-normal lengths between the fewest and the most. They are shifted until their mean is as asked.

    >>> lengths = draw_lengths(random.Random(0), 256, (100, 400, 1024))
    >>> min(lengths), round(statistics.mean(lengths)), max(lengths)
    (100, 400, 1024)
    """
    fewest, mean, most = limits
    normal = [generator.gauss(0, 0.55) for _ in range(count)]
    location, lengths = math.log(mean), [mean]
    for _ in range(60):
        lengths = [min(max(round(math.exp(location + value)), fewest), most) for value in normal]
        location += 0.5 * math.log(mean / statistics.mean(lengths))
    return lengths


def measure_all(
    policy: PreTrainedModel,
    rollouts: list[Rollout],
    examples: list[TokenizedExample],
    config: TrainingStepConfig,
    sft_config: SFTConfig,
) -> Iterator[dict[str, Any]]:
    """Yield what is measured, part by part."""
    trained, _ = GRPO_train.rows_to_train_on(rollouts, config)
    all_pairs, trained_pairs = (
        [(row.response.prompt_ids, row.response.token_ids) for row in rows] for rows in (rollouts, trained)
    )
    sft_pairs = [(row.prompt_ids, row.response_ids) for row in examples]
    for settings in add_large_microbatches(config, config):
        optimizer = restart_training(policy, settings)
        update = partial(GRPO_train.update_policy, policy, optimizer, rollouts, 0, 1, settings)
        work = count_work(policy, trained_pairs, settings.microbatch_size, settings.microbatch_tokens)
        yield measure("GRPO update", update, work, settings, config)
        if settings is config:
            score = partial(GRPO_train.score_old_log_probs, policy, rollouts, 0, config)
            work = count_work(policy, all_pairs, config.scoring_batch_size, 0, is_training=False)
            row = measure("old log-probs", score, work, settings, config)
            yield row | {"microbatch_tokens": 0, "microbatch_rows": config.scoring_batch_size}
        del optimizer, update  # and with them AdamW's moments
    for settings in add_large_microbatches(sft_config, config):
        optimizer = restart_training(policy, settings)
        step = partial(take_sft_step, policy, optimizer, examples, settings)
        work = count_work(policy, sft_pairs, settings.microbatch_size, settings.microbatch_tokens)
        yield measure("SFT step", step, work, settings, config)


def add_large_microbatches(settings: AnyTrainConfig, config: TrainingStepConfig) -> list[AnyTrainConfig]:
    """Return the settings, and those with large microbatches and checkpointing if they differ."""
    update = {"microbatch_tokens": config.large_microbatch_tokens, "gradient_checkpointing": True}
    large = settings.model_copy(update=update | {"gradient_accumulation_steps": 1})
    return [settings] if large == settings else [settings, large]


def restart_training(policy: PreTrainedModel, settings: TrainConfig) -> torch.optim.Optimizer:
    """Return a new optimizer, and forget what the measurement before has left."""
    policy.gradient_checkpointing_disable()
    gc.collect()
    return prepare_training(policy, settings)


def take_sft_step(
    policy: PreTrainedModel, optimizer: torch.optim.Optimizer, examples: list[TokenizedExample], settings: SFTConfig
) -> None:
    """Take an optimizer step as SFT_train.py does."""
    accumulate = partial(SFT_train.accumulate_gradients, policy, examples, 0, settings)
    compute_clipped_gradient(policy, accumulate, settings)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def count_work(
    policy: PreTrainedModel,
    pairs: Sequence[tuple[list[int], list[int]]],
    max_rows: int,
    max_tokens: int,
    is_training: bool = True,
) -> Work:
    """Count the useful operations on (prompt, response) rows. Nothing counts that is computed a second time.

        F = 2 n W + 4 L d s + 2 r d V        three times that with the backward pass

    n nodes, W weights in the L blocks' matmuls, d width of the model and of all its heads, s pairs of a node and one
    that it sees, r response tokens, V vocabulary. A prefix that rows of a microbatch share counts once.
    """
    config = cast(Any, policy.config)
    width, num_layers = config.hidden_size, config.num_hidden_layers
    kv_width = width * config.num_key_value_heads // config.num_attention_heads
    weights = num_layers * width * (2 * width + 2 * kv_width + 3 * config.intermediate_size)
    prompts, responses = [prompt for prompt, _ in pairs], [response for _, response in pairs]
    plan = plan_microbatches(prompts, responses, max_rows, max_tokens)
    nodes = flop = 0
    for part in plan:
        batch = join_prompt_and_response_ids([prompts[i] for i in part], [responses[i] for i in part], 0)
        tree = build_prefix_tree(batch["input_ids"], batch["response_mask"])
        nodes += tree.token_ids.numel()
        flop += 4 * num_layers * width * int((tree.positions + 1).sum())
    flop += 2 * nodes * weights + 2 * sum(map(len, responses)) * width * config.vocab_size
    row_tokens = sum(map(len, prompts)) + sum(map(len, responses))
    return Work(row_tokens, nodes, len(plan), flop * (3 if is_training else 1) / 1e12)


def measure(
    part: str, action: Callable[[], object], work: Work, settings: TrainConfig, config: TrainingStepConfig
) -> dict[str, Any]:
    """Return the median seconds of an action after one to warm up, its rates, and its peak memory."""
    warm_up_seconds, is_cuda = timed(action, config.device), config.device != "cpu"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(config.device)
    taken = [timed(action, config.device) for _ in range(config.num_repetitions)]
    seconds = statistics.median(taken)
    keys = {"microbatch_tokens", "gradient_checkpointing", "compile_policy", "compute_dtype"}
    return {
        "part": part,
        **settings.model_dump(include=keys),
        "microbatch_rows": settings.microbatch_size,
        "seconds": seconds,
        "all_seconds": taken,
        "warm_up_seconds": warm_up_seconds,
        "tokens_per_second": work.row_tokens / seconds,
        **work._asdict(),
        "peak_gib": peak_memory_gib(config.device),
        "peak_reserved_gib": torch.cuda.max_memory_reserved(config.device) / 2**30 if is_cuda else None,
    }


def describe(policy: PreTrainedModel, peak: float, config: TrainingStepConfig) -> dict[str, Any]:
    """Return the first line of JSON: card, versions, inputs, and the matmul peak in TFLOP/s."""
    environment = describe_environment()
    own = TrainingStepConfig.model_fields.keys() - GRPOConfig.model_fields.keys() - {"device", "results"}
    return {
        "device": config.device if config.device == "cpu" else torch.cuda.get_device_name(config.device),
        **{name: environment[name] for name in ("time", "python", "versions", "git_commit", "cpu", "cpu_count")},
        "matmul_tflop_per_second": peak,
        "parameters": policy.num_parameters(),
        "attention": policy.config._attn_implementation,
        **config.model_dump(mode="json", include=own | {"preset", "rollout_batch_size", "group_size"}),
    }


if __name__ == "__main__":
    run_main(main)
