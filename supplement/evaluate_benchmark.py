"""MMLU, GSM8K, AlpacaEval and SimpleSafetyTests: `uv run python -m supplement.evaluate_benchmark [key=value ...]`.

For each task: load, put into the prompt, sample greedily, parse, score, write. By torchrun each rank has an engine, and
samples its share. In the run's folder are then

    samples/<task>.jsonl        every question with its response, the answer read from it, and whether it is right
    mmlu_by_subject.csv         accuracy by subject, with 95 % Wilson intervals
    alpaca_eval.json            the judge's input, a JSON array
    simple_safety_tests.jsonl   the judge's input, JSON lines
    metrics.jsonl               accuracy, share of responses without an answer, examples a second

The metrics are defined in docs/metrics.md, the method in docs/supplement.md.
Source: Stanford CS336 (Spring 2025), supplement of Assignment 5, sections 2 and 4.
"""

import plainrl.startup  # noqa: F401  # first: Ctrl-C during the imports shows no traceback

import csv
import json
import random
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from plainrl.cli import load_config, run_main
from plainrl.data import VALIDATION_SUBSET_SEED, derive_seed, fixed_subset
from plainrl.devices import check_devices
from plainrl.distributed import join, on_first
from plainrl.engine import engine_settings, init_vllm, sample_responses, sampling_params
from plainrl.model_files import resolve_model
from plainrl.prompting import fill_prompt, load_prompt_template
from plainrl.records import UserError
from plainrl.run_folder import EVALUATION, RunFolder
from plainrl.several_samples import wilson_interval
from plainrl.supplement_config import BenchmarkConfig
from SFT_helper import encode_prompt
from supplement.benchmark_tasks import TASKS, Question, Task

if TYPE_CHECKING:
    from vllm import LLM

FENCE = "```"  # the zero-shot prompt opens one for the answer, and the model closes it
NUM_SHOWN = 10  # errors that are shown
MOST_SHOWN_CHARS = 300


class Answered(NamedTuple):
    """A question, the response without what ends it, the answer read from it, and whether that is right."""

    question: Question
    output: str
    answer: str | None
    is_right: bool | None  # None: a judge has to say


def main(arguments: list[str]) -> None:
    """Configuration, questions, engine; then task by task: sample, score, write, show."""
    if any(argument.startswith("resume=") for argument in arguments):
        raise UserError("resume: an evaluation is not gone on with; start it again")
    config = load_config(BenchmarkConfig, Path(__file__).with_name("evaluate_benchmark.yaml"), arguments)
    check_devices(config)
    join(config)
    questions = load_questions(config)
    template = load_prompt_template(config.prompt)
    with RunFolder.create(config, EVALUATION) as run:
        llm = init_vllm(resolve_model(config.model), **engine_settings(config))
        run.start_wandb()
        tokenizer = cast(PreTrainedTokenizerBase, llm.get_tokenizer())
        prompts = {name: encode(name, asked, template, tokenizer, config) for name, asked in questions.items()}
        for name, asked in questions.items():
            answered, seconds, num_cut = answer(llm, name, asked, prompts[name], template, run, config)
            metrics = summarize(TASKS[name], answered, seconds) | {"truncated_fraction": num_cut / len(asked)}
            on_first(partial(write_samples, run.path / "samples" / f"{name}.jsonl", answered))
            if any(row.question.subject for row in answered) and TASKS[name].parse:
                on_first(partial(write_subjects, run.path / f"{name}_by_subject.csv", answered))
            run.log({"eval_step": 0} | {f"eval/{name}_{key}": value for key, value in metrics.items()})
            on_first(partial(show, name, TASKS[name], answered, metrics, run, config))
        print(f"all responses: {run.path / 'samples'}")


def load_questions(config: BenchmarkConfig) -> dict[str, list[Question]]:
    """Return the questions of each task: all, or a fixed random subset.

    Raises:
        UserError: there is no such task, or its data are missing.
    """
    found: dict[str, list[Question]] = {}
    for name in config.tasks:
        if name not in TASKS:
            raise UserError(f"tasks = {list(config.tasks)}: there is no {name!r}; use some of {', '.join(TASKS)}")
        questions = TASKS[name].load(Path(config.benchmark_data))
        if not questions:
            raise UserError(f"tasks: {name} has no question in {config.benchmark_data}; download its data again")
        found[name] = fixed_subset(questions, config.num_questions)
    return found


def encode(
    name: str, questions: Sequence[Question], template: str, tokenizer: PreTrainedTokenizerBase, config: BenchmarkConfig
) -> list[list[int]]:
    """Return the token ids of a task's prompts.

    Raises:
        UserError: a prompt leaves no room for a response.
    """
    prompts = [encode_prompt(fill_prompt(template, question.instruction), tokenizer) for question in questions]
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    needed = len(prompts[longest]) + config.sampling_max_tokens
    if needed > config.max_context_tokens:
        raise UserError(
            f"max_context_tokens = {config.max_context_tokens}: the longest prompt of {name} and sampling_max_tokens = "
            f"{config.sampling_max_tokens} take {needed}; raise the first, lower the second, or leave {name} out"
        )
    return prompts


def answer(
    llm: "LLM",
    name: str,
    questions: Sequence[Question],
    prompts: Sequence[list[int]],
    template: str,
    run: RunFolder,
    config: BenchmarkConfig,
) -> tuple[list[Answered], float, int]:
    """Sample a response to each question, and read the answers.

    Returns:
        The answered questions, how long the sampling took in seconds, and how many responses were cut.
    """
    seeds = [derive_seed(config.seed, name, index) for index in range(len(prompts))]
    print(f"{name}: {len(prompts)} questions", flush=True)
    started = time.perf_counter()
    with run.watched("evaluate"):
        responses = sample_responses(llm, prompts, sampling_params(config), seeds, with_log_probs=False)
    seconds = time.perf_counter() - started
    task, answered = TASKS[name], []
    for question, response in zip(questions, responses, strict=True):
        output = clean(response.text, template, config.stop_string)
        answered.append(read_answer(task, question, output))
    return answered, seconds, sum(response.finish_reason == "length" for response in responses)


def clean(text: str, template: str, stop_string: str) -> str:
    """Return a response without the stop string, and without the fence that closes what the prompt opened.

    >>> clean("It is 3.\\n```\\n\\n# Query:", "# Answer:\\n```\\n", "# Query:")
    'It is 3.'
    """
    if stop_string:
        text = text.partition(stop_string)[0]
    if template.rstrip().endswith(FENCE):
        text = re.sub(rf"\s*{FENCE}\s*\Z", "", text)
    return text.strip()


def read_answer(task: Task, question: Question, output: str) -> Answered:
    """Parse and score a response. What cannot be parsed is wrong."""
    if task.parse is None:
        return Answered(question, output, None, None)
    found = task.parse(question, output)
    return Answered(question, output, found, found is not None and task.is_right(found, question.truth or ""))


def summarize(task: Task, answered: Sequence[Answered], seconds: float) -> dict[str, float | int]:
    """Return the metrics of a task.

    - num_examples, examples_per_second: questions, and how many were answered a second
    - accuracy: share that is right, with its 95 % Wilson interval, accuracy_low and accuracy_high
    - num_unparsed: responses from which no answer could be read, which count as wrong
    """
    metrics: dict[str, float | int] = {"num_examples": len(answered), "examples_per_second": len(answered) / seconds}
    if task.parse is None:
        return metrics
    accuracy = sum(bool(row.is_right) for row in answered) / len(answered)
    low, high = wilson_interval(accuracy, len(answered))
    metrics |= {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    return metrics | {"num_unparsed": sum(row.answer is None for row in answered)}


def accuracy_by_subject(answered: Sequence[Answered]) -> list[tuple[str, int, float, float, float]]:
    """Return for each subject: its name, questions, the share that is right, and the 95 % Wilson interval."""
    by_subject: dict[str, list[bool]] = {}
    for row in answered:
        by_subject.setdefault(row.question.subject or "", []).append(bool(row.is_right))
    found = []
    for subject, results in sorted(by_subject.items()):
        share = sum(results) / len(results)
        found.append((subject, len(results), share, *wilson_interval(share, len(results))))
    return found


def write_subjects(path: Path, answered: Sequence[Answered]) -> None:
    """Write what `accuracy_by_subject` returns as CSV."""
    with path.open("w", newline="") as file:
        names = ("subject", "num_examples", "accuracy", "low", "high")
        csv.writer(file).writerows([names, *accuracy_by_subject(answered)])


def write_samples(path: Path, answered: Sequence[Answered]) -> None:
    """Write every question with its response and its score, as JSON lines."""
    rows = [
        {
            **row.question.record,
            "instruction": row.question.instruction,
            "output": row.output,
            "parsed": row.answer,
            "truth": row.question.truth,
            "is_right": row.is_right,
        }
        for row in answered
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def show(
    name: str,
    task: Task,
    answered: Sequence[Answered],
    metrics: dict[str, Any],
    run: RunFolder,
    config: BenchmarkConfig,
) -> None:
    """Print the result of a task with ten errors; or write the judge's input, and say what to do with it."""
    speed = f"{metrics['examples_per_second']:.2f} examples a second"
    if task.judge:
        path = run.path / task.judge.file_name
        pairs = [(row.question, row.output) for row in answered]
        path.write_text(task.judge.write(pairs, config.generator or config.model), encoding="utf-8")
        print(
            f"\n=== {name}: {len(answered)} responses, {speed} ===\n"
            f"They need a judge, a model of 70B. Its input is {path}. In the assignment's repository:\n"
            f"  {task.judge.command.format(path=path.resolve())}"
        )
        return
    print(
        f"\n=== {name}: accuracy {metrics['accuracy']:.3f} (95 % interval {metrics['accuracy_low']:.3f} to "
        f"{metrics['accuracy_high']:.3f}) on {len(answered)} questions, {metrics['num_unparsed']} without an answer, "
        f"{speed} ==="
    )
    if any(row.question.subject for row in answered):
        print(f"  {'subject':<40} {'asked':>5}   right   95 % interval")
        for subject, num_asked, share, low, high in accuracy_by_subject(answered):
            print(f"  {subject:<40} {num_asked:>5}   {share:.3f}   {low:.3f} to {high:.3f}")
    errors = [row for row in answered if not row.is_right]
    shown = random.Random(VALIDATION_SUBSET_SEED).sample(errors, min(NUM_SHOWN, len(errors)))
    print(f"{len(shown)} of {len(errors)} errors:")
    for row in shown:
        print(f"--- {row.question.record['question'][:MOST_SHOWN_CHARS]}")
        print(f"    truth: {row.question.truth}   read: {row.answer}   response: {row.output[:MOST_SHOWN_CHARS]!r}")


if __name__ == "__main__":
    run_main(main)
