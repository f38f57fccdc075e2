"""TRL's side of the benchmark: SFTTrainer or GRPOTrainer on the same task.

    python -m experiments.benchmark.trl_side TASK.json RESULT.json

The benchmark starts it in an environment of its own (`uv run --with trl==...`), because this project does not depend
on TRL.

Settings are those that the documentation of TRL and Transformers recommends for this hardware. Of those that leave
the result equal, they are the fastest that we found:

    float32 weights with bfloat16 autocast, if that is the compute_dtype; ours computes with a 16-bit copy beside them
    the fused AdamW
    no gradient checkpointing, except where the task asks for it
    one optimizer step for all rollouts, so that no old log-probs are computed; no KL term

The first step is a warm-up. The matmuls of SFT are counted in one more step, after times and memory are taken.
"""

import importlib.metadata
import itertools
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

from plainrl.grading.rewards import REWARD_FUNCTIONS
from plainrl.lookup import look_up


class StepClock(TrainerCallback):
    """Records the time at the end of each optimizer step, and the peak memory so far."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.peaks: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record both."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.peaks.append(peak_memory_gib())

    def figures(self, num_measured_steps: int) -> dict[str, float]:
        """Return the median seconds of the measured steps, and the peak memory of these and the warm-up."""
        ends = self.ends[: 1 + num_measured_steps]
        seconds = statistics.median(end - begin for begin, end in itertools.pairwise(ends))
        return {"step_seconds": seconds, "peak_memory_gib": self.peaks[num_measured_steps]}


class MatmulCounter:
    """Counts the operations of a trainer's matmuls, forward and backward, from a step on; the first step is 0."""

    def __init__(self, trainer: Any, clock: StepClock, first_step: int) -> None:
        self.tflop = 0.0
        for owner, method in ((trainer, "compute_loss"), (trainer.accelerator, "backward")):
            setattr(owner, method, self._counted(getattr(owner, method), clock, first_step))

    def _counted(self, method: Callable[..., Any], clock: StepClock, first_step: int) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if len(clock.ends) < first_step:
                return method(*arguments, **keywords)
            with FlopCounterMode(display=False) as counter:
                result = method(*arguments, **keywords)
            self.tflop += counter.get_total_flops() / 1e12
            return result

        return call


def peak_memory_gib() -> float:
    """Return the peak memory of the process so far, in GiB; of the GPU, if it uses one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def time_calls(trainer: Any, name: str) -> list[float]:
    """Return a list that receives the seconds of each later call of a trainer's method."""
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
        "bf16": task["compute_dtype"] == "bfloat16",
        "gradient_checkpointing": task["gradient_checkpointing"],
        "optim": "adamw_torch_fused",
        "adam_beta1": task["adam_betas"][0],
        "adam_beta2": task["adam_betas"][1],
        "weight_decay": task["weight_decay"],
        "max_grad_norm": task["max_grad_norm"],
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": task["microbatch_size"],
        "gradient_accumulation_steps": task["batch_size"] // task["microbatch_size"],
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
    }


def sft_settings(task: dict[str, Any]) -> dict[str, Any]:
    """Return SFTTrainer's own settings: a warm-up, the measured steps, and one in which matmuls are counted."""
    return {"max_length": task["max_length"], "max_steps": 1 + task["num_measured_steps"] + 1}


def grpo_settings(task: dict[str, Any]) -> dict[str, Any]:
    """Return GRPOTrainer's own settings."""
    return {
        "max_steps": 1 + task["num_measured_steps"],
        "num_generations": task["group_size"],
        "max_completion_length": task["response_tokens"],
        "generation_kwargs": {"min_new_tokens": task["response_tokens"]},
        "temperature": task["temperature"],
        "beta": 0.0,
        "loss_type": "grpo",
        "shuffle_dataset": False,
    }


def run_sft(task: dict[str, Any], settings: dict[str, Any]) -> dict[str, float]:
    """Train on the task's rows, the same in every step; the loss is on the response's tokens, as in ours."""
    rows = [
        {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
        for prompt, response in zip(task["prompt_ids"], task["response_ids"], strict=True)
    ]
    clock = StepClock()
    trainer = SFTTrainer(
        model=task["model"],
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
        callbacks=[clock],
    )
    counter = MatmulCounter(trainer, clock, first_step=1 + task["num_measured_steps"])
    trainer.train()
    figures = clock.figures(task["num_measured_steps"])
    return figures | {
        "tokens_per_second": sum(len(row["input_ids"]) for row in rows) / figures["step_seconds"],
        "computed_tflop": counter.tflop,
        "tflop_per_second": counter.tflop / figures["step_seconds"],
    }


def run_grpo(task: dict[str, Any], settings: dict[str, Any]) -> dict[str, float]:
    """Take GRPO steps on the task's questions, with our grader; every response has exactly the same length."""
    grade_one = look_up(task["reward"], REWARD_FUNCTIONS, "reward")

    def reward(
        completions: list[str], completion_ids: list[list[int]], ground_truth: list[str], **_: Any
    ) -> list[float]:
        lengths = {len(ids) for ids in completion_ids}
        if lengths != {task["response_tokens"]}:
            raise ValueError(f"responses of {sorted(lengths)} tokens, not all of {task['response_tokens']}")
        return [grade_one(response, truth)["reward"] for response, truth in zip(completions, ground_truth, strict=True)]

    clock = StepClock()
    columns = zip(task["prompts"], task["ground_truths"], strict=True)
    trainer = GRPOTrainer(
        model=task["model"],
        reward_funcs=reward,
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": prompt, "ground_truth": truth} for prompt, truth in columns]),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
        callbacks=[clock],
    )
    rollout, grade = time_calls(trainer, "_generate"), time_calls(trainer, "_calculate_rewards")
    trainer.train()
    rollout_seconds, grade_seconds = statistics.median(rollout[1:]), statistics.median(grade[1:])
    figures = clock.figures(task["num_measured_steps"])
    return figures | {
        "rollout_seconds": rollout_seconds,
        "grade_seconds": grade_seconds,
        "train_seconds": figures["step_seconds"] - rollout_seconds - grade_seconds,
        "sampled_tokens_per_second": task["batch_size"] * task["response_tokens"] / rollout_seconds,
        "num_trained_rows": task["batch_size"],
    }


def main() -> None:
    """Run the task; write its figures, and TRL's versions and settings."""
    task_path, result_path = map(Path, sys.argv[1:])
    task = json.loads(task_path.read_text())
    choose, run = {"sft": (sft_settings, run_sft), "grpo": (grpo_settings, run_grpo)}[task["benchmark"]]
    settings = common_settings(task, str(task_path.parent / "trl")) | choose(task)
    figures = run(task, settings)
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
