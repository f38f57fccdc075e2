"""What TRL's side is given to do: the same model, data and step as ours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from experiments.benchmark.settings import BenchmarkConfig, grpo_settings, sft_examples, sft_settings
from plainrl.config import SFTConfig
from plainrl.data import epoch_order, load_questions, load_validation_set
from plainrl.model_files import resolve_model
from plainrl.records import UserError

TRL_CHECKPOINTING = "trl, checkpointing"  # TRL's default: it takes less memory and more time


def require_same_work(config: BenchmarkConfig, names: Sequence[str]) -> None:
    """Raise a UserError for settings with which TRL's side of these benchmarks would do other work than ours."""
    of_step = {"sft": ("sft_batch_size", "trl_sft_microbatch"), "grpo": ("train_batch_size", "trl_grpo_microbatch")}
    for batch, microbatch in (of_step[name] for name in names if name in of_step):
        rows, part = getattr(config, batch), getattr(config, microbatch)
        if rows % min(part, rows):
            raise UserError(f"{batch} = {rows}: TRL would leave rows out; use a multiple of {microbatch} = {part}")
    if not {"sft", "grpo"} & set(names):
        return
    ours = {"optimizer": "adamw", "lora_rank": 0, "float32_output_layer": False}
    if "grpo" in names:
        ours |= {"epochs_per_rollout_batch": 1, "train_batch_size": config.rollout_batch_size, "kl_coefficient": 0.0}
        ours |= {"entropy_coefficient": 0.0, "dynamic_sampling": False, "mask_truncated_responses": False}
    for key, value in ours.items():
        if getattr(config, key) != value:
            raise UserError(f"{key} = {getattr(config, key)}: TRL's side does the work of {key} = {value}; use that")


def trl_task(name: str, turn: str, config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    """Return what trl_side.py needs to do the work of our `work_sft` or `work_grpo`.

    Args:
        name: sft or grpo.
        turn: trl or TRL_CHECKPOINTING.
        config: our settings.
        folder: for temporary files.
    """
    settings = sft_settings(config) if name == "sft" else grpo_settings(config, folder)
    task = {
        "benchmark": name,
        "model": str(Path(resolve_model(config.model)).absolute()),
        "device": config.policy_device,
        "compute_dtype": config.compute_dtype,
        "batch_size": settings.train_batch_size,
        "num_measured_steps": config.num_measured_steps if name == "sft" else config.num_grpo_steps,
        "learning_rate": settings.learning_rate,
        "adam_betas": settings.adam_betas,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": turn == TRL_CHECKPOINTING,
    }
    if isinstance(settings, SFTConfig):
        return task | _sft_part(settings, config, task["model"])
    return task | _grpo_part(settings, config)


def _sft_part(settings: SFTConfig, config: BenchmarkConfig, model: str) -> dict[str, Any]:
    from SFT_train import tokenize_examples

    batch = tokenize_examples(sft_examples(settings), AutoTokenizer.from_pretrained(model), settings)
    return {
        "microbatch_size": min(config.trl_sft_microbatch, settings.train_batch_size),
        "max_length": settings.max_context_tokens,
        "prompt_ids": [row.prompt_ids for row in batch],
        "response_ids": [row.response_ids for row in batch],
    }


def _grpo_part(settings: BenchmarkConfig, config: BenchmarkConfig) -> dict[str, Any]:
    questions = load_questions(load_validation_set(settings), settings)
    num_draws = settings.n_grpo_steps * settings.num_questions_per_step
    chosen = [questions[index] for index in epoch_order(len(questions), num_draws, settings.seed)]
    return {
        "microbatch_size": min(config.trl_grpo_microbatch, settings.train_batch_size),
        "group_size": settings.group_size,
        "response_tokens": settings.sampling_max_tokens,
        "temperature": settings.sampling_temperature,
        "reward": settings.reward,
        "prompts": [example.prompt for example in chosen],
        "ground_truths": [example.ground_truth for example in chosen],
    }
