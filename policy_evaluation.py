"""Evaluate a policy by sampling: reward, length and entropy of its responses. The script is the zero-shot baseline.

    uv run python policy_evaluation.py [model=...] [data=...] [any key of config.yaml=...]

Source of the quantities: Stanford CS336 (Spring 2025), Assignment 5, sections 3 and 4.
Importing this module imports neither vLLM nor wandb and starts no CUDA context.
"""

import plainrl.startup  # noqa: F401  # first: Ctrl-C during the imports shows no traceback

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plainrl.checkpoint import fingerprint, seed_everything
from plainrl.cli import load_config, run_main, with_data_key
from plainrl.config import SFTConfig, TrainConfig
from plainrl.data import (
    by_dataset,
    derive_seed,
    fit_prompts,
    fixed_subset,
    load_validation_set,
    require_questions,
    validation_subset,
)
from plainrl.devices import check_devices
from plainrl.distributed import deal, gather, join, rank, require_alike
from plainrl.engine import (
    check_policy_sync,
    engine_settings,
    init_vllm,
    load_policy_into_vllm_instance,
    sample_responses,
    sampling_params,
    sleep_vllm_instance,
)
from plainrl.grading.rewards import (
    Grade,
    RewardFunction,
    as_reward,
    count_failures,
    grade_response,
    own_means,
    report_problems,
)
from plainrl.policy import load_policy, score_responses
from plainrl.preflight import check_scores
from plainrl.records import Example, Response, UserError, mean
from plainrl.report.renew import show_first_result
from plainrl.run_folder import EVALUATION, RunFolder
from plainrl.run_records import describe_evaluation, metrics_table
from plainrl.several_samples import is_of_several, repeat_each, samples_table, sampling_seeds, summarize_samples
from plainrl.shared_config import validation_source
from SFT_helper import encode_prompt, pad_token_id

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

CATEGORIES = ("format 1, answer 1", "format 1, answer 0", "format 0")
NUM_PROBE_PROMPTS = 8
NUM_SHOWN_FIRST = 8  # questions whose result is printed before the others are sampled
# Every evaluation of every run samples the same questions with the same seeds, so that only the policy makes curves
# differ.
VALIDATION_SAMPLING_SEED = 0


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
    num_entropy_responses: int | Literal["all"] = "all",
    seed: int = 0,
    num_samples: int = 1,
    output_path: Path | None = None,
    fields: Sequence[Mapping[str, Any]] | None = None,
    show_first: Callable[[list[dict[str, Any]]], None] | None = None,
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Sample responses to each prompt, grade them, and summarize.

    Args:
        vllm_model: the engine.
        reward_fn: maps (response, ground truth, fields that it names) to format_reward, answer_reward and reward.
        prompts: N prompts, written out.
        eval_sampling_params: temperature, limits, stop strings.
        ground_truths: N answers.
        tokenizer: by default the engine's.
        policy: computes the token entropy. Without it that metric is None.
        scoring_batch_size: responses per forward pass of the policy.
        num_entropy_responses: how many responses get a token entropy (a count, or all); see `choose_scored`.
        seed: prompt i is sampled with a seed derived from (seed, i), whatever else is in the batch.
        num_samples: responses to each prompt. Those after the first have a seed derived from (seed, i, their number).
        output_path: JSON-lines file that every example is written to.
        fields: of each prompt, what the reward function may ask for by name.
        show_first: gets the examples of the first `NUM_SHOWN_FIRST` prompts before those of the others are sampled.

    Returns: metrics (see `summarize_evaluation`), and one dictionary per response (see `log_generations`).

    Raises: ValueError if there is no prompt, or the numbers of prompts and ground truths differ.
    """
    if len(prompts) != len(ground_truths) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(ground_truths)} ground truths: give one each, at least one")
    tokenizer = tokenizer or cast(PreTrainedTokenizerBase, vllm_model.get_tokenizer())
    prompt_ids = repeat_each([encode_prompt(prompt, tokenizer) for prompt in prompts], num_samples)
    seeds = sampling_seeds(seed, len(prompts), num_samples)
    given = repeat_each(fields or [{}] * len(prompts), num_samples)
    prompts, ground_truths = repeat_each(prompts, num_samples), repeat_each(ground_truths, num_samples)
    responses, grades, rewards, sampling_seconds = [], [], [], 0.0
    num_first = min(NUM_SHOWN_FIRST * num_samples if show_first else 0, len(prompts))
    for start, end in pairwise(sorted({0, num_first, len(prompts)})):
        part, started = slice(start, end), time.perf_counter()
        responses += sample_responses(vllm_model, prompt_ids[part], eval_sampling_params, seeds[part], False)
        sampling_seconds += time.perf_counter() - started
        grades += grade_by_ranks([one.text for one in responses[part]], ground_truths[part], given[part], reward_fn)
        rewards = [grade.rewards for grade in grades]
        if show_first and end < len(prompts):
            show_first(log_generations(prompts[part], responses, ground_truths[part], rewards, num_samples=num_samples))
    report_problems(grades)
    entropies = score_entropies(policy, responses, tokenizer, scoring_batch_size, num_entropy_responses, seed)
    examples = log_generations(prompts, responses, ground_truths, rewards, entropies, output_path, num_samples)
    return summarize_evaluation(examples, grades, sampling_seconds, reward_fn), examples


def score_entropies(
    policy: PreTrainedModel | None,
    responses: Sequence[Response],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    num_scored: int | Literal["all"],
    seed: int,
) -> list[float | None]:
    """Return the mean token entropy of the responses that `choose_scored` chooses, and None for the others."""
    entropies: list[float | None] = [None] * len(responses)
    if policy is not None:
        chosen = choose_scored(len(responses), num_scored, seed)
        scores = score_responses(policy, [responses[i] for i in chosen], pad_token_id(tokenizer), batch_size)
        for index, score in zip(chosen, scores, strict=True):
            entropies[index] = mean(score["token_entropy"].tolist())
    return entropies


def grade_by_ranks(
    texts: Sequence[str],
    ground_truths: Sequence[str],
    fields: Sequence[Mapping[str, Any]],
    reward_fn: RewardFunction,
) -> list[Grade]:
    """Return what `grading.rewards.grade_responses` does, and report nothing. Each rank grades its share."""
    reward = as_reward(reward_fn)
    share = deal(list(zip(texts, ground_truths, fields, strict=True)))
    return gather([grade_response(text, truth, reward, given) for text, truth, given in share])


def summarize_evaluation(
    examples: Sequence[dict[str, Any]], grades: Sequence[Grade], sampling_seconds: float, reward_fn: RewardFunction
) -> dict[str, float | None]:
    """Return all metrics of an evaluation. docs/metrics.md defines them.

    They are those of `summarize_examples`, the numbers of answers that could not be compared (reward_timeouts,
    reward_out_of_memory, reward_errors; they count as wrong), the means of what else the reward function returns
    (reward_<name>), sampled_tokens_per_second, and with several responses to
    a question those of `plainrl.several_samples.summarize_samples`.
    """
    failures = count_failures([grade.failure for grade in grades])
    metrics = summarize_examples(examples) | {f"reward_{name}": count for name, count in failures.items()}
    metrics |= {f"reward_{name}": value for name, value in own_means([grade.rewards for grade in grades]).items()}
    num_tokens = sum(example["response_length"] for example in examples)
    metrics["sampled_tokens_per_second"] = num_tokens / sampling_seconds
    if any(example["sample"] > 0 for example in examples):
        metrics |= summarize_samples(examples, as_reward(reward_fn).extract)
    return metrics


def choose_scored(num_responses: int, num_scored: int | Literal["all"], seed: int) -> list[int]:
    """Return the indices of the responses whose entropy is computed: a random subset that the seed decides.

    >>> choose_scored(4, "all", seed=0), len(choose_scored(100, 16, seed=0))
    ([0, 1, 2, 3], 16)
    """
    return fixed_subset(range(num_responses), num_scored, derive_seed(seed, "entropy"))


def log_generations(
    prompts: Sequence[str],
    responses: Sequence[Response],
    ground_truths: Sequence[str],
    rewards: Sequence[dict[str, float]],
    token_entropies: Sequence[float | None] | None = None,
    output_path: Path | None = None,
    num_samples: int = 1,
) -> list[dict[str, Any]]:
    """Return one dictionary per response, and write them as JSON lines if a path is given.

    `question` and `sample` count the questions, and the responses to each, from 0. Those to a question stand next to
    each other. Further keys: prompt, response, ground_truth, format_reward, answer_reward, reward, token_entropy (mean
    over the response's tokens, in nats; None if it was not computed), response_length (in tokens) and finish_reason
    (`length` if the response was cut).
    """
    entropies = token_entropies or [None] * len(responses)
    columns = zip(prompts, responses, ground_truths, rewards, entropies, strict=True)
    examples = [
        {
            "question": index // num_samples,
            "sample": index % num_samples,
            "prompt": prompt,
            "response": response.text,
            "ground_truth": truth,
            **reward,
            "token_entropy": entropy,
            "response_length": len(response.token_ids),
            "finish_reason": response.finish_reason,
        }
        for index, (prompt, response, truth, reward, entropy) in enumerate(columns)
    ]
    if output_path is not None and rank() == 0:
        output_path.write_text("".join(json.dumps(example, allow_nan=False) + "\n" for example in examples))
    return examples


def summarize_examples(examples: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the metrics of an evaluation. A mean over nothing is None. Each example is one response.

    - num_examples: questions asked
    - reward, format_reward, answer_reward: means over all responses
    - num_format_*: counts of the assignment's three categories
    - response_length, response_length_correct, response_length_incorrect: means over all, correct and other responses,
      in tokens
    - token_entropy: mean over all tokens of the responses that have one, in nats
    - num_entropy_responses: how many have one
    - truncated_fraction: share of the responses that were cut at the length limit
    """
    correct = [example for example in examples if example["answer_reward"] == 1]
    incorrect = [example for example in examples if example["answer_reward"] != 1]
    categories = [category(example) for example in examples]
    scored = [example for example in examples if example["token_entropy"] is not None]  # an empty response has none
    num_tokens = sum(example["response_length"] for example in scored)
    entropy_sum = sum(example["token_entropy"] * example["response_length"] for example in scored)
    return {
        "num_examples": len({example["question"] for example in examples}),
        "reward": mean([example["reward"] for example in examples]),
        "format_reward": mean([example["format_reward"] for example in examples]),
        "answer_reward": mean([example["answer_reward"] for example in examples]),
        "num_format_1_answer_1": categories.count(CATEGORIES[0]),
        "num_format_1_answer_0": categories.count(CATEGORIES[1]),
        "num_format_0": categories.count(CATEGORIES[2]),
        "response_length": mean([example["response_length"] for example in examples]),
        "response_length_correct": mean([example["response_length"] for example in correct]),
        "response_length_incorrect": mean([example["response_length"] for example in incorrect]),
        "token_entropy": entropy_sum / num_tokens if scored else None,
        "num_entropy_responses": len(scored),
        "truncated_fraction": mean([float(example["finish_reason"] == "length") for example in examples]),
    }


def category(example: Mapping[str, Any]) -> str:
    """Return the category of an example, one of the assignment's three."""
    if example["format_reward"] <= 0:
        return CATEGORIES[2]
    return CATEGORIES[0] if example["answer_reward"] == 1 else CATEGORIES[1]


class Evaluator:
    """The one engine of a run, and evaluations with it: fixed questions, sampling settings and a reward function.

    GRPO and expert iteration sample their rollouts from the same engine.

    Call `sync` before sampling from new weights. `evaluate` calls it by itself.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
    ) -> None:
        """Start the engine. The examples fit into the context: see `fit_validation` in plainrl/data.py."""
        self.config, self.run, self.tokenizer, self.examples = config, run, tokenizer, examples
        self._last_step = sys.maxsize
        self.before_sync: Callable[[], None] = lambda: None  # waits for what the engine samples: plainrl/sampler.py
        # A longer prompt is cut, because a probe need not be a whole prompt.
        longest = config.max_context_tokens - config.num_sync_tokens
        self._probe_ids = [encode_prompt(one.prompt, tokenizer)[:longest] for one in examples[:NUM_PROBE_PROMPTS]]
        self.llm = init_vllm(
            tokenizer.name_or_path,  # the folder that policy and tokenizer were loaded from
            **engine_settings(config),
            enable_sleep_mode=config.shares_gpu,
        )
        seed_everything(config.seed)  # because the engine reseeds the global generators when it starts
        self.sleep()  # because a resumed SFT run may train before the first sync

    def sync(self, policy: PreTrainedModel, with_probes: bool = True) -> dict[str, float]:
        """Copy the policy's weights into the engine, and check on probe prompts that it samples from them.

        Args:
            policy: the policy to copy.
            with_probes: false if the caller checks the sync on the responses that it samples.

        Returns:
            The metrics of `check_policy_sync`, or nothing without probes.
        """
        self.before_sync()
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
        )

    def sleep(self) -> None:
        """Free the engine's memory if it shares a GPU with the policy. The next sync wakes the engine up."""
        if self.config.shares_gpu:
            sleep_vllm_instance(self.llm)

    def evaluate(self, policy: PreTrainedModel, eval_step: int) -> dict[str, float | None]:
        """Evaluate on the held-out questions of `num_eval_examples`. Log `eval/*`, and return the metrics."""
        self._last_step = eval_step
        return self._evaluate(policy, eval_step, self.examples, "eval")

    def evaluate_finally(self, policy: PreTrainedModel, num_steps: int, examples: Sequence[Example]) -> None:
        """Evaluate the trained policy on the `num_final_eval_examples` questions, and log `eval_all/*`.

        Its step is num_steps, or the last that was evaluated if the run ended before.
        """
        self._evaluate(policy, min(num_steps, self._last_step), examples, "eval_all")

    def samples_path(self, eval_step: int, prefix: str = "eval", dataset: str = "") -> Path:
        """Return the path of the file with the examples of an evaluation, or of a further validation set of it."""
        return self.run.path / "samples" / dataset / f"{prefix}_{eval_step:06d}.jsonl"

    def _evaluate(
        self, policy: PreTrainedModel, eval_step: int, examples: Sequence[Example], prefix: str
    ) -> dict[str, float | None]:
        """Sync, sample and grade. Write the examples to samples/ and log the metrics as `<prefix>/*`.

        Those of a further validation set are logged as `<prefix>/<its name>/*`.
        """
        require_alike(fingerprint((one.prompt, one.ground_truth) for one in examples), "validation data")
        seconds: dict[str, float] = {}
        found: dict[str, dict[str, float | None]] = {}
        with self.run.watched("evaluate", seconds):
            sync_metrics = self.sync(policy)
            for dataset, of_set in by_dataset(examples).items():
                path = self.samples_path(eval_step, prefix, dataset)
                path.parent.mkdir(exist_ok=True)
                is_first_of_run = eval_step == 0 and prefix == "eval" and not found
                found[dataset] = self._measure(policy, of_set, path, shows_first=is_first_of_run)
        metrics = found.pop("") | sync_metrics | {"seconds": seconds["time/evaluate"]}
        further = {f"{dataset}/{name}": value for dataset in found for name, value in found[dataset].items()}
        self.run.log({"eval_step": eval_step} | {f"{prefix}/{name}": v for name, v in (metrics | further).items()})
        for dataset, of_set in found.items():
            print(f"{dataset}: {describe_evaluation(of_set, eval_step)}", flush=True)
        return metrics

    def _measure(
        self, policy: PreTrainedModel, examples: Sequence[Example], path: Path, shows_first: bool = False
    ) -> dict[str, float | None]:
        """Sample responses to the questions of one validation set, grade them, and return the metrics."""
        config = self.config

        def show_first(first: list[dict[str, Any]]) -> None:
            show_first_result(first, summarize_examples(first), len(examples), config)

        return evaluate_vllm(
            self.llm,
            config.reward_function,
            [example.prompt for example in examples],
            sampling_params(config.model_copy(update={"sampling_temperature": config.evaluation_temperature})),
            [example.ground_truth or "" for example in examples],
            tokenizer=self.tokenizer,
            policy=policy,
            scoring_batch_size=config.scoring_batch_size,
            num_entropy_responses=config.num_entropy_responses,
            seed=VALIDATION_SAMPLING_SEED,
            num_samples=config.num_eval_samples,
            output_path=path,
            fields=[example.reward_fields for example in examples],
            show_first=show_first if shows_first else None,
        )[0]


def main(arguments: list[str]) -> None:
    """Evaluate a model without training it. Print a table and ten examples of each category."""
    arguments = with_data_key(arguments)
    if any(argument.startswith("resume=") for argument in arguments):
        raise UserError("resume: an evaluation is not gone on with; start it again")
    config = load_config(SFTConfig, Path(__file__).with_name("config.yaml"), arguments)
    check_devices(config)
    join(config)
    examples = validation_subset(load_validation_set(config), config)
    with RunFolder.create(config, EVALUATION) as run:
        policy, tokenizer = load_policy(config, for_training=False)
        check_scores(policy, config)
        examples, _ = fit_prompts(examples, tokenizer, config, "validation prompts")  # before the engine starts
        require_questions(examples, config)
        run.start_wandb()
        evaluator = Evaluator(config, run, tokenizer, examples)
        metrics = evaluator.evaluate(policy, eval_step=0)
        path = evaluator.samples_path(0)
        if rank() == 0:  # which wrote the file, and alone prints
            print_categories(examples, [json.loads(line) for line in path.read_text().splitlines()])
        print(f"\n{config.model} on {validation_source(config.model_dump())}, prompt {config.prompt}:")
        print(metrics_table({name: value for name, value in metrics.items() if not is_of_several(name)}))
        if config.num_eval_samples > 1:
            print(f"\n{config.num_eval_samples} responses per question:\n{samples_table(metrics)}\n")
        print(f"all examples: {path}")


def print_categories(examples: Sequence[Example], graded: Sequence[Mapping[str, Any]]) -> None:
    """Print ten examples of each of the assignment's three categories."""
    for name in CATEGORIES:
        members = [(examples[row["question"]], row) for row in graded if category(row) == name]
        print(f"\n=== {name}: {len(members)} of {len(graded)} ===")
        for asked, row in members[:10]:
            print(f"--- question: {asked.question}")
            print(f"    truth: {row['ground_truth']}    response: {row['response']!r}")


if __name__ == "__main__":
    run_main(main)
