"""The keys of `benchmark gpu`, and what is sampled and trained on: made-up prompts and responses of stated lengths."""

import math
import random
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from transformers import Qwen2Config

from experiments.benchmark.random_model import QWEN_SHAPE
from experiments.benchmark.settings import OTHER_IN_SFT, REPOSITORY, refuse_foreign_keys
from plainrl.cli import load_config
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.devices import SMALL_GPU_BYTES
from plainrl.help import help_text
from plainrl.records import Example, Response, Rollout, TokenizedExample, UserError
from plainrl.shared_config import DTYPE_KEYS

YAML = REPOSITORY / "grpo_train.yaml"
NOTHING = Example("", "", None, None, "")
LEARNING_RATE = 1e-12  # nearly zero: all repetitions have the same weights, and the same work
Range = tuple[int, int]
Length = tuple[int, int, int]


class Shape(NamedTuple):
    """A model to measure with, and the settings that suit it, unless they are given."""

    model: Qwen2Config
    settings: Sequence[str]


TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
TINY |= {"bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 1024}
TINY_SETTINGS = (
    *("rollout_batch_size=16", "train_batch_size=16", "group_size=4", "sft_batch_size=8", "microbatch_tokens=160"),
    *("template_tokens=10", "question_tokens=[3,7]", "response_tokens=[5,16,40]", "trace_tokens=[5,24,60]"),
    *("sampling_max_tokens=64", "max_context_tokens=256", "engine_eager=true", "num_repetitions=1"),
)
SHAPES = {
    "qwen2.5-math-1.5b": Shape(QWEN_SHAPE, ()),
    "tiny": Shape(Qwen2Config.from_dict(TINY), TINY_SETTINGS),
}


class GPUBenchmarkConfig(GRPOConfig):
    """The keys of GRPO_train.py, and those of this benchmark."""

    device: str = Field("cuda:0", pattern=r"^(cpu|cuda:\d+)$", description="what is measured: cpu or cuda:N")
    part: Literal["all", "training", "engine"] = Field("all", description="what is measured: all, or one half")
    shape: Literal[tuple(SHAPES)] = Field(  # pyright: ignore[reportInvalidTypeForm]
        "qwen2.5-math-1.5b", description="shape of the model. tiny also has small batches, unless they are given"
    )
    num_repetitions: int = Field(3, ge=1, description="timed repetitions of the training half. Their median counts")
    num_engine_repetitions: int = Field(2, ge=1, description="likewise, of what needs the engine")
    advantage_fraction: float = Field(0.6, gt=0, le=1, description="share of the groups that have an advantage")
    template_tokens: int = Field(100, ge=0, description="prompt tokens that all rows share")
    question_tokens: Range = Field((20, 80), description="further prompt tokens: fewest, most")
    response_tokens: Length = Field((100, 400, 1024), description="tokens of a rollout: fewest, mean, most")
    trace_tokens: Length = Field((100, 600, 2500), description="tokens of an SFT response: fewest, mean, most")
    sft_batch_size: int = Field(128, ge=1, description="examples of an SFT step")
    results: str = Field("runs/gpu_benchmark.csv", description="CSV file of the figures, written anew")

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        for name in ("question_tokens", "response_tokens", "trace_tokens"):
            lengths = getattr(self, name)
            if sorted(lengths) != list(lengths) or lengths[0] < 1:
                raise ValueError(f"{name} = {list(lengths)}: give numbers from 1 on that do not become smaller")
        if self.response_tokens[0] < self.sampling_min_tokens or self.response_tokens[-1] > self.sampling_max_tokens:
            raise ValueError(
                f"response_tokens = {list(self.response_tokens)}: sampling_min_tokens = {self.sampling_min_tokens} is "
                f"the fewest that a response can have, and sampling_max_tokens = {self.sampling_max_tokens} the most"
            )
        longest = self.template_tokens + self.question_tokens[-1] + self.sampling_max_tokens
        if longest > self.max_context_tokens:
            raise ValueError(
                f"max_context_tokens = {self.max_context_tokens}: prompts and responses have up to {longest} tokens "
                "(template_tokens + question_tokens + sampling_max_tokens); raise it to that"
            )
        return self


def load_settings(arguments: list[str]) -> tuple[GPUBenchmarkConfig, SFTConfig]:
    """Return the settings of both scripts, on the device to be measured.

    Keys that both scripts know hold for both. But an SFT step has `sft_batch_size` examples.

    Raises:
        UserError: a setting is wrong, or the device is not there.
    """
    if arguments in (["--help"], ["-h"]):
        print(help_text(GPUBenchmarkConfig, YAML, "-m experiments.benchmark gpu"))
        raise SystemExit(0)
    refuse_foreign_keys(arguments)
    given = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    device, shape = (given.get(key) or GPUBenchmarkConfig.model_fields[key].default for key in ("device", "shape"))
    suitable = [f"preset={preset_for(device)}", *(SHAPES[shape].settings if shape in SHAPES else ())]
    if device == "cpu":  # a GPU's preset asks for bfloat16, in which not every processor is fast
        suitable += [f"{name}=cpu" for name in DTYPE_KEYS.values()] + [f"{key}=auto" for key in DTYPE_KEYS]
    arguments = [*arguments, *(setting for setting in suitable if setting.partition("=")[0] not in given)]
    config = load_config(GPUBenchmarkConfig, YAML, arguments)
    if not has_device(config.device):
        raise UserError(f"device = {config.device}: there is no such device; run where the GPU is, or use device=cpu")
    keys = SFTConfig.model_fields.keys() - OTHER_IN_SFT
    of_both = [argument for argument in arguments if argument.partition("=")[0] in keys]
    sft_arguments = [*of_both, f"train_batch_size={config.sft_batch_size}"]
    sft_config = load_config(SFTConfig, REPOSITORY / "config.yaml", sft_arguments)
    update = {"policy_device": config.device, "evaluator_device": config.device, "learning_rate": LEARNING_RATE}
    return config.model_copy(update=update), sft_config.model_copy(update=update)


def preset_for(device: str) -> str:
    """Return the preset that suits one device."""
    is_card = device != "cpu" and has_device(device)
    is_small = is_card and torch.cuda.get_device_properties(device).total_memory < SMALL_GPU_BYTES
    return "small-gpu" if is_small else "one-gpu"


def has_device(device: str) -> bool:
    """Return whether a device, cpu or cuda:N, is there."""
    number = device.removeprefix("cuda:")
    return device == "cpu" or (
        torch.cuda.is_available() and number.isdecimal() and int(number) < torch.cuda.device_count()
    )


def make_inputs(config: GPUBenchmarkConfig) -> tuple[list[Rollout], list[TokenizedExample]]:
    """Return made-up rollouts and SFT examples. The first groups have advantages +1 and -1 in turn, the others 0."""
    generator = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(5, SHAPES[config.shape].model.vocab_size) for _ in range(count)]

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
