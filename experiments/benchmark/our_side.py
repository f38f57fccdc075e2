"""Our side of each benchmark, in a process that `turns.take_turn` starts.

python -m experiments.benchmark.our_side TASK.json RESULT.json
"""

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer

from experiments.benchmark.measuring import count_tflop, timed
from experiments.benchmark.settings import BenchmarkConfig, exact_length, grpo_settings, sft_examples, sft_settings
from experiments.benchmark.turns import PHASES, Figures
from plainrl.config import GRPOConfig
from plainrl.data import load_questions, load_validation_set
from plainrl.devices import peak_memory_gib
from plainrl.engine import engine_settings, init_vllm, sample_responses, sampling_params
from plainrl.grading.rewards import grade_responses
from plainrl.model_files import resolve_model
from plainrl.policy import compute_clipped_gradient, load_policy, prepare_training
from plainrl.records import Example, Response, Rollout
from plainrl.run_records import read_metrics
from SFT_helper import encode_prompt, pad_token_id

NUM_GRADINGS = 20


def main(task_path: Path, result_path: Path) -> None:
    """Take the turn that a task file describes; write its figures, by side."""
    task = json.loads(task_path.read_text())
    config = BenchmarkConfig.model_validate(task["config"])
    result_path.write_text(json.dumps(WORK[task["benchmark"]](config, task["turn"])))


def work_sft(config: BenchmarkConfig, turn: str) -> dict[str, Figures]:
    """Time the optimizer step of SFT_train.py."""
    from SFT_train import accumulate_gradients, tokenize_examples

    settings = sft_settings(config)
    policy, tokenizer = load_policy(settings)
    batch = tokenize_examples(sft_examples(settings), tokenizer, settings)
    optimizer = prepare_training(policy, settings)
    accumulate = partial(accumulate_gradients, policy, batch, pad_token_id(tokenizer), settings)

    def step() -> None:
        compute_clipped_gradient(policy, accumulate, settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    seconds = statistics.median(timed(step, settings.policy_device) for _ in range(config.num_measured_steps))
    peak_memory = peak_memory_gib(settings.policy_device)
    tflop = count_tflop(step)
    return {
        "ours": {
            "tokens_per_second": sum(len(row.prompt_ids) + len(row.response_ids) for row in batch) / seconds,
            "step_seconds": seconds,
            "computed_tflop": tflop,
            "tflop_per_second": tflop / seconds,
            "peak_memory_gib": peak_memory,
        }
    }


def work_grpo(config: BenchmarkConfig, turn: str) -> dict[str, Figures]:
    """Run GRPO_train.py for a warm-up step and the measured ones; its own metrics are the figures."""
    import GRPO_train

    Path(config.runs_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.runs_dir) as name:  # it saves a checkpoint after the last step
        settings = grpo_settings(config, Path(name))
        own_keys = BenchmarkConfig.model_fields.keys() - GRPOConfig.model_fields.keys()
        path = Path(name) / "grpo.yaml"
        path.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude=own_keys) | {"preset": "auto"}))
        GRPO_train.main([f"config={path}"])
        rows = [row for row in read_metrics(Path(name) / "grpo") if "time/step" in row][1:]

    def median(key: str) -> float:
        return statistics.median(row[key] for row in rows)

    return {
        "ours": {
            "step_seconds": median("time/step"),
            **{f"{phase}_seconds": median(f"time/{phase}") for phase in PHASES},
            "sync_fraction": statistics.median(row["time/sync"] / row["time/step"] for row in rows),
            "sampled_tokens_per_second": median("time/tokens_per_second"),
            "num_trained_rows": median("train/num_trained_rows"),
            "reward": median("rollout/reward"),
            "peak_memory_gib": rows[-1]["memory/peak_gib"],
        }
    }


def work_rollout(config: BenchmarkConfig, turn: str) -> dict[str, Figures]:
    """Sample the same rollout batch by sample_responses and by LLM.generate, with an empty prefix cache each time."""
    settings = config.model_copy(update=exact_length(config))
    folder = resolve_model(settings.model)
    questions = load_questions([], settings)[: settings.num_questions_per_step]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt_ids = [encode_prompt(one.prompt, tokenizer) for one in questions for _ in range(settings.group_size)]
    llm = init_vllm(folder, **engine_settings(settings))
    params, seeds = sampling_params(settings), range(len(prompt_ids))
    requests = [params.clone() for _ in seeds]
    for seed, request in zip(seeds, requests, strict=True):
        request.seed, request.logprobs = seed, 0
    prompts: Any = [{"prompt_token_ids": ids} for ids in prompt_ids]
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: sample_responses(llm, prompt_ids, params, seeds),
        "LLM.generate": lambda: llm.generate(prompts, requests, use_tqdm=False),
        "LLM.generate, no seeds, no log-probs": lambda: llm.generate(prompts, params, use_tqdm=False),
    }
    sides["ours"]()
    num_tokens, figures = len(prompt_ids) * settings.sampling_max_tokens, {}
    for side, sample in sides.items():
        llm.reset_prefix_cache()
        figures[side] = {"sampled_tokens_per_second": num_tokens / timed(sample, settings.policy_device)}
    return figures


def work_logprob(config: BenchmarkConfig, turn: str) -> dict[str, Figures]:
    """Time old log-probs and training on invented responses to the training questions, all of them trained on."""
    from GRPO_train import score_old_log_probs, update_policy

    num_questions = config.num_logprob_questions * (2 if turn == "twice the questions" else 1)
    length = config.sampling_max_tokens * (2 if turn == "twice the length" else 1)
    policy, tokenizer = load_policy(config)
    questions = load_questions([], config)[:num_questions]
    prompt_ids = [encode_prompt(question.prompt, tokenizer) for question in questions]
    rollouts = invent_rollouts(questions, prompt_ids, config.group_size, length, policy.config.vocab_size)
    optimizer, padding_id = prepare_training(policy, config), pad_token_id(tokenizer)

    num_microbatches = max(len(rollouts) // config.microbatch_size, 1)
    update = {"train_batch_size": len(rollouts), "gradient_accumulation_steps": num_microbatches}
    update |= {"max_sync_error": math.inf}  # no engine sampled these responses
    settings = config.model_copy(update=update)

    def score() -> None:
        score_old_log_probs(policy, rollouts, padding_id, settings)

    def train() -> None:
        update_policy(policy, optimizer, rollouts, padding_id, 1, settings)

    score()
    train()
    figures = {
        "old_log_probs_seconds": timed(score, config.policy_device),
        "train_seconds": timed(train, config.policy_device),
        "peak_memory_gib": peak_memory_gib(config.policy_device),
    }
    figures["both_seconds"] = figures["old_log_probs_seconds"] + figures["train_seconds"]
    if turn == "ours":
        figures["computed_tflop"] = count_tflop(score) + count_tflop(train)
        figures["tflop_per_second"] = figures["computed_tflop"] / figures["both_seconds"]
    return {turn: figures}


def invent_rollouts(
    questions: list[Example], prompt_ids: list[list[int]], group_size: int, length: int, vocab_size: int
) -> list[Rollout]:
    """Return rollouts of random tokens, with advantage +1 and -1 in turn."""
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for index in range(len(questions) * group_size):
        token_ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        question = index // group_size
        response = Response(prompt_ids[question], "", token_ids, [0.0] * length, "length")
        rollouts.append(Rollout(questions[question], response, {"reward": 0.0}, 1.0 - 2 * (index % 2)))
    return rollouts


def work_grade(config: BenchmarkConfig, turn: str) -> dict[str, Figures]:
    """Grade a batch of answers, every other one wrong; the fastest of several times counts."""
    truths = [example.ground_truth or "" for example in load_validation_set(config)][: config.rollout_batch_size]
    answers = [truth if index % 2 else f"{truth}1" for index, truth in enumerate(truths)]
    responses = [f" So it is {answer}. </think> <answer> {answer} </answer>" for answer in answers]
    grades = grade_responses(responses, truths, config.reward_function)
    assert [grade.rewards["reward"] for grade in grades] == [index % 2 for index in range(len(truths))]

    def grade() -> None:
        grade_responses(responses, truths, config.reward_function)

    seconds = min(timed(grade, "cpu") for _ in range(NUM_GRADINGS))
    return {"ours": {"graded_responses_per_second": len(truths) / seconds}}


WORK: dict[str, Callable[[BenchmarkConfig, str], dict[str, Figures]]] = {
    "sft": work_sft,
    "grpo": work_grpo,
    "rollout": work_rollout,
    "logprob": work_logprob,
    "grade": work_grade,
}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
