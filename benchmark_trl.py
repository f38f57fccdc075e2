"""The peer's side of benchmark.py, which starts it: TRL's SFTTrainer or GRPOTrainer on the same task, in an environment
of its own (`uv run --with trl==...`), for TRL is no dependency of this project.

    python benchmark_trl.py TASK.json RESULT.json

Settings: those that TRL's and Transformers' documentation recommend for this hardware, and of those that leave the
result equal the fastest that we found: float32 weights with bfloat16 autocast (as ours), no gradient checkpointing,
the fused AdamW, one optimizer step for all rollouts, so that no old log-probs are computed, no KL term. The first step
is a warm-up, in which the matrix products are counted.
"""

import importlib.metadata
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

from math_reward import REWARD_FUNCTIONS


class StepClock(TrainerCallback):
    """Takes the time at the end of each optimizer step, and counts the products of the first: forward and backward."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tflop = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Median seconds of a step, the first left out."""
        return statistics.median(end - begin for begin, end in zip(self.ends, self.ends[1:], strict=False))

    def count_products(self, trainer: Any) -> None:
        """From here on count what `trainer` computes until its first step ends."""
        for owner, method in ((trainer, "compute_loss"), (trainer.accelerator, "backward")):
            setattr(owner, method, self._counted(getattr(owner, method)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if self.ends:
                return method(*arguments, **keywords)
            with FlopCounterMode(display=False) as counter:
                result = method(*arguments, **keywords)
            self.tflop += counter.get_total_flops() / 1e12
            return result

        return call


def time_calls(trainer: Any, name: str) -> list[float]:
    """Return a list that from here on receives the seconds of each call of a trainer's method."""
    method, seconds = getattr(trainer, name), []

    def call(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        result = method(*arguments, **keywords)
        seconds.append(time.perf_counter() - started)
        return result

    setattr(trainer, name, call)
    return seconds


def common_settings(task: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the settings that both trainers share."""
    return {
        "output_dir": folder,
        "use_cpu": task["device"] == "cpu",
        "bf16": True,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "adam_beta1": task["adam_betas"][0],
        "adam_beta2": task["adam_betas"][1],
        "weight_decay": task["weight_decay"],
        "max_grad_norm": task["max_grad_norm"],
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_steps": 1 + task["num_measured_steps"],
        "per_device_train_batch_size": task["microbatch_size"],
        "gradient_accumulation_steps": task["batch_size"] // task["microbatch_size"],
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
    }


def run_sft(task: dict[str, Any], settings: dict[str, Any]) -> dict[str, float]:
    """Train on the task's rows, the same ones in every step; the loss is of the response's tokens, as in ours."""
    rows = [
        {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
        for prompt, response in zip(task["prompt_ids"], task["response_ids"], strict=True)
    ]
    clock = StepClock()
    trainer = SFTTrainer(
        model=task["model"],
        args=SFTConfig(max_length=task["max_length"], **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
        callbacks=[clock],
    )
    clock.count_products(trainer)
    trainer.train()
    return {
        "tokens_per_second": sum(len(row["input_ids"]) for row in rows) / clock.seconds,
        "step_seconds": clock.seconds,
        "computed_tflop": clock.tflop,
        "tflop_per_second": clock.tflop / clock.seconds,
    }


def run_grpo(task: dict[str, Any], settings: dict[str, Any]) -> dict[str, float]:
    """Take GRPO steps on the task's questions, graded by our grader, every response of exactly the same length."""

    def reward(
        completions: list[str], completion_ids: list[list[int]], ground_truth: list[str], **_: Any
    ) -> list[float]:
        lengths = {len(ids) for ids in completion_ids}
        if lengths != {task["response_tokens"]}:
            raise ValueError(f"responses of {sorted(lengths)} tokens, not all of {task['response_tokens']}")
        return [
            REWARD_FUNCTIONS[task["reward"]](response, truth)["reward"]
            for response, truth in zip(completions, ground_truth, strict=True)
        ]

    clock = StepClock()
    columns = zip(task["prompts"], task["ground_truths"], strict=True)
    trainer = GRPOTrainer(
        model=task["model"],
        reward_funcs=reward,
        args=GRPOConfig(
            num_generations=task["group_size"],
            max_completion_length=task["response_tokens"],
            generation_kwargs={"min_new_tokens": task["response_tokens"]},
            temperature=task["temperature"],
            beta=0.0,
            loss_type="grpo",
            shuffle_dataset=False,
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt, "ground_truth": truth} for prompt, truth in columns]),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
        callbacks=[clock],
    )
    clock.count_products(trainer)
    rollout, grade = time_calls(trainer, "_generate"), time_calls(trainer, "_calculate_rewards")
    trainer.train()
    rollout_seconds, grade_seconds = statistics.median(rollout[1:]), statistics.median(grade[1:])
    train_seconds = clock.seconds - rollout_seconds - grade_seconds
    return {
        "step_seconds": clock.seconds,
        "rollout_seconds": rollout_seconds,
        "grade_seconds": grade_seconds,
        "train_seconds": train_seconds,
        "sampled_tokens_per_second": task["batch_size"] * task["response_tokens"] / rollout_seconds,
        "num_trained_rows": task["batch_size"],
        "computed_tflop": clock.tflop,
        "tflop_per_second": clock.tflop / train_seconds,
    }


def main() -> None:
    """Run the task and write its figures, the peer's versions and its settings."""
    task_path, result_path = map(Path, sys.argv[1:])
    task = json.loads(task_path.read_text())
    settings = common_settings(task, str(task_path.parent / "trl"))
    figures = {"sft": run_sft, "grpo": run_grpo}[task["benchmark"]](task, settings)
    if task["device"] == "cpu":
        figures["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    else:
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    packages = ("trl", "torch", "transformers", "datasets", "accelerate")
    del settings["output_dir"]
    result = {
        "figures": figures,
        "settings": settings,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    result_path.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
