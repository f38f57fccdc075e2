"""What a GPU does: tokens per second of rollouts and of training, seconds of a step by phase, peak memory, MFU.

    uv run --no-sync python -m experiments.benchmark gpu [device=cuda:0] [part=training|engine] [key=value ...]

The model has the shape of Qwen2.5-Math-1.5B and random weights, which are made and removed again. Prompts and traces
are random tokens of stated lengths. So nothing is downloaded. training_step.py says what the training half is, and
engine_step.py what needs the engine. Where vLLM is absent, that half is skipped, and one line says so.

The settings are those of preset `one-gpu`, or of `small-gpu` for a card under 40 GB, unless another is given. All keys
of GRPO_train.py are known; `gpu --help` lists them. `device=cpu shape=tiny` tries the command where there is no GPU.

Each line of the CSV file is one figure, with the card's name, written as soon as it is measured. The first lines are
the environment and the settings.
"""

import csv
import gc
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from experiments.benchmark.engine_step import measure_engine, why_no_engine
from experiments.benchmark.gpu_figures import ENVIRONMENT, SETTINGS, Figure, Measured, as_text, in_words
from experiments.benchmark.gpu_settings import SHAPES, GPUBenchmarkConfig, load_settings
from experiments.benchmark.measuring import matmul_peak
from experiments.benchmark.random_model import make_random_model, number_tokenizer
from experiments.benchmark.training_step import measure_training
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.memory import ADVICE
from plainrl.records import UserError, first_line
from plainrl.run_records import describe_environment

OF_STEP = {"preset", "rollout_batch_size", "train_batch_size", "group_size", "epochs_per_rollout_batch", "loss_type"}
WARM_UP_MATMULS = 5  # the first ones let a GPU reach its clock
SPARE_ROWS = 16  # of the embedding table: Transformers may add special tokens


def measure_gpu(arguments: list[str]) -> None:
    """Measure each part; write its figures and print its line at once."""
    config, sft_config = load_settings(arguments)
    path = Path(config.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="model-") as folder, path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Figure._fields)
        file.flush()
        for part, setting, figures in measure(config, sft_config, folder):
            for name, value in figures.items():
                writer.writerow(Figure(card_name(config.device), part, setting, name, *as_text(name, value)))
            file.flush()
            print(f"{part}{f' ({setting})' if setting else ''}: {in_words(figures)}", flush=True)
    print(f"written to {path}")


def measure(config: GPUBenchmarkConfig, sft_config: SFTConfig, folder: str) -> Iterator[Measured]:
    """Yield environment, settings, and the figures of each part.

    Args:
        config, sft_config: the settings of both scripts.
        folder: where the random model is put.

    Raises:
        UserError: the GPU's memory does not suffice.
    """
    environment = describe_environment()
    names = ("time", "python", "git_commit", "cpu", "cpu_count", "memory_gib")
    num_repetitions = 1 if config.device == "cpu" else WARM_UP_MATMULS
    peak = max(matmul_peak(config.device, config.compute_dtype) for _ in range(num_repetitions))
    shown = {name: environment[name] for name in names} | environment["versions"] | card_figures(config.device)
    yield Measured(ENVIRONMENT, "", shown | {"matmul_tflop_per_second": peak})
    own = GPUBenchmarkConfig.model_fields.keys() - GRPOConfig.model_fields.keys() - {"results"}
    yield Measured(SETTINGS, "", config.model_dump(mode="json", include=own | OF_STEP))
    transformers_logging.disable_progress_bar()
    shape = SHAPES[config.shape].model
    tokenizer = number_tokenizer(shape.vocab_size - SPARE_ROWS)
    make_random_model(Path(folder), tokenizer, shape, config.device)
    config = config.model_copy(update={"model": folder})
    halves: dict[str, Callable[[], Iterator[Measured]]] = {
        "training": partial(measure_training, config, sft_config.model_copy(update={"model": folder}), peak),
        "engine": partial(measure_engine, config, peak),
    }
    for half in halves if config.part == "all" else [config.part]:
        reason = why_no_engine(config) if half == "engine" else ""
        try:
            yield from [Measured(half, "", {"skipped": reason})] if reason else halves[half]()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"part = {half}: the memory of {config.device} does not suffice ({first_line(error)}); {ADVICE}"
            ) from None
        gc.collect()  # and with it the policy's memory


def card_name(device: str) -> str:
    """Return the name of the GPU, or cpu."""
    return device if device == "cpu" else torch.cuda.get_device_name(device)


def card_figures(device: str) -> dict[str, Any]:
    """Return what tells one card from another of the same name."""
    if device == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return {"card_gib": properties.total_memory / 2**30, "compute_capability": capability, "cuda": torch.version.cuda}
