"""Responses to a step's questions: sample, grade, summarize and record them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from plainrl.config import GRPOConfig, RolloutConfig
from plainrl.data import derive_seed
from plainrl.devices import peak_memory_gib
from plainrl.distributed import deal, gather, num_ranks, rank
from plainrl.engine import Submitted, collect, require_small_sync_error, sampling_params, submit
from plainrl.grading.rewards import Grade, count_failures, grade_response, own_means, report_problems
from plainrl.records import Example, Response, Rollout, mean
from plainrl.selection import QuestionOrder, find_mixed, num_questions_to_ask

if TYPE_CHECKING:
    from vllm import LLM


MIN_TOKENS_TO_CHECK = 128  # fewest tokens of a rollout batch that can check the weight sync


@contextmanager
def thread_pool(num_threads: int) -> Iterator[Executor]:
    """Provide threads in a `with` statement. Unlike with ThreadPoolExecutor's, an error cancels what is queued."""
    threads = ThreadPoolExecutor(num_threads)
    try:
        yield threads
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def sample_groups(
    llm: "LLM",
    questions: Sequence[Example],
    prompt_ids: Sequence[list[int]],
    chosen: Sequence[int],
    step: int,
    config: RolloutConfig,
    grading_threads: Executor,
    asked_before: Sequence[int] = (),
) -> tuple[list[Response], "WaitForGrades"]:
    """Sample `group_size` responses to each chosen question. The responses of a group stand next to each other.

    Every request has its own seed, which is derived from (seed, step, question, sample). With several ranks, each
    samples and grades its share of the groups, and all receive everything.

    Args:
        llm: the engine.
        questions: all training questions.
        prompt_ids: token ids of each question's prompt.
        chosen: indices of the questions of this step. If one comes twice, its second group has other seeds.
        step: the number of the rollout batch.
        config: sampling settings, group size, seed, reward function.
        grading_threads: where responses are graded.
        asked_before: the questions of earlier rounds of this step. One that comes again has other seeds, too.

    Returns:
        The responses, and a function that waits for their grades. A response is graded as soon as it is finished,
        while the engine goes on with the others.
    """
    groups = submit_groups(llm, prompt_ids, chosen, step, config, step - 1, asked_before)
    return gather_groups(collect_groups(llm, questions, groups, config, grading_threads), config)


class Groups(NamedTuple):
    """Groups of responses that an engine was asked for."""

    requests: list[tuple[int, int]]  # question and sample of each, of this rank
    submitted: Submitted
    policy_step: int  # see Response


def submit_groups(
    llm: "LLM",
    prompt_ids: Sequence[list[int]],
    chosen: Sequence[int],
    step: int,
    config: RolloutConfig,
    policy_step: int,
    asked_before: Sequence[int] = (),
) -> Groups:
    """Ask the engine for `group_size` responses to each chosen question.

    Args: as for `sample_groups`.
        policy_step: number of rollout batches that the engine's policy was trained on.
    """
    requests: list[tuple[int, int]] = []  # question, sample
    for place, index in enumerate(chosen):  # a question may come twice, where one epoch ends and the next begins
        first = [*asked_before, *chosen[:place]].count(index) * config.group_size
        requests += [(index, sample) for sample in range(first, first + config.group_size)]
    requests = deal(requests, config.group_size)
    submitted = submit(
        llm,
        [prompt_ids[index] for index, _ in requests],
        sampling_params(config),
        [derive_seed(config.seed, "rollout", step, index, sample) for index, sample in requests],
        with_log_probs=config.has_engine_log_probs,
    )
    return Groups(requests, submitted, policy_step)


class Collected(NamedTuple):
    """The finished responses of this rank's engine in the order of their requests, and their grades to come."""

    responses: list[Response]
    gradings: list[Future[Grade]]


def collect_groups(
    llm: "LLM",
    questions: Sequence[Example],
    groups: Groups,
    config: RolloutConfig,
    grading_threads: Executor,
) -> Collected:
    """Wait for the responses that this rank's engine was asked for, and have them graded.

    Args: as for `sample_groups`.
    """
    requests, submitted, policy_step = groups
    reward = config.reward_function
    responses: dict[int, Response] = {}
    gradings: dict[int, Future[Grade]] = {}
    for position, response in collect(llm, submitted):
        question = questions[requests[position][0]]
        responses[position] = response._replace(policy_step=policy_step)
        gradings[position] = grading_threads.submit(
            grade_response, response.text, question.ground_truth or "", reward, question.reward_fields
        )
    order = range(len(requests))
    return Collected([responses[position] for position in order], [gradings[position] for position in order])


def gather_groups(collected: Collected, config: RolloutConfig) -> tuple[list[Response], "WaitForGrades"]:
    """Return what the engines of all ranks collected.

    Returns: as for `sample_groups`.
    """

    @cache
    def wait_for_grades() -> list[Grade]:
        return gather([grading.result() for grading in collected.gradings], config.group_size)

    return gather(collected.responses, config.group_size), wait_for_grades


WaitForGrades = Callable[[], list[Grade]]  # waits until the responses of a round are graded, and returns the grades


class Sampled(NamedTuple):
    """What a step sampled: its questions, `group_size` responses to each in turn, and their grades to come."""

    chosen: list[int]  # indices of the questions
    responses: list[Response]
    rounds: list[WaitForGrades]  # one without dynamic_sampling

    def wait_for_grades(self) -> list[Grade]:
        """Return the grades of all responses, in their order, as soon as they are there."""
        return [grade for wait_for_round in self.rounds for grade in wait_for_round()]


def sample_rounds(
    llm: "LLM",
    questions: Sequence[Example],
    prompt_ids: Sequence[list[int]],
    order: QuestionOrder,
    step: int,
    config: GRPOConfig,
    grading_threads: Executor,
) -> Sampled:
    """Sample responses to the next questions of the order: `num_questions_per_step`, as `sample_groups` does.

    With `dynamic_sampling`, this is the first round. Further ones follow until that many groups are mixed, or
    `max_resampling_rounds` further rounds are over. Whether another follows is known once a round
    is graded. The last that is allowed is not waited for.

    Args: as for `sample_groups`.
        order: gives the questions, and moves on.
    """
    sampled = Sampled([], [], [])
    most_rounds = 1 + (config.max_resampling_rounds if config.dynamic_sampling else 0)
    count = config.num_questions_per_step
    while count:
        chosen = order.draw(count)
        responses, wait_for_grades = sample_groups(
            llm, questions, prompt_ids, chosen, step, config, grading_threads, asked_before=sampled.chosen
        )
        sampled = Sampled(sampled.chosen + chosen, sampled.responses + responses, [*sampled.rounds, wait_for_grades])
        if len(sampled.rounds) == most_rounds:
            break
        is_mixed = find_mixed(sampled.wait_for_grades(), config.group_size)
        count = num_questions_to_ask(len(is_mixed), sum(is_mixed), config.num_questions_per_step)
    return sampled


def make_rollouts(
    questions: Sequence[Example],
    responses: Sequence[Response],
    grades: Sequence[Grade],
    advantages: Sequence[float] | None,
    group_size: int,
) -> list[Rollout]:
    """Join what the update needs of each response. The responses stand in the order of the questions, G for each.

    Without advantages they are zero for now. GRPO_train.py sets those of the rollouts that it chooses.

    Raises:
        RewardError: a reward function of the user's own failed for every response.
    """
    report_problems(grades)
    repeated = [question for question in questions for _ in range(group_size)]
    advantages = [0.0] * len(repeated) if advantages is None else advantages
    return [
        Rollout(question, response, grade.rewards, advantage, grade.failure)
        for question, response, grade, advantage in zip(repeated, responses, grades, advantages, strict=True)
    ]


def measure_gap(rollouts: Sequence[Rollout], log_probs: Tensor, config: GRPOConfig) -> dict[str, float]:
    """Return the sum and the maximum of |engine - policy log-prob|, and the number of tokens.

    With several engines, `gap_sum.k` and `num_gap_tokens.k` are also there of engine k: that one has stale weights
    would not show in a mean over many.

    Args:
        rollouts: the rollouts, which hold the engine's log-probs.
        log_probs: (tokens,), the policy's log-probs of all response tokens, one response after the other, on the CPU.
        config: gives `sampling_min_tokens`. That many first tokens of each response are left out, because the engine
            samples them without EOS.
    """
    engine = torch.tensor([value for rollout in rollouts for value in rollout.response.log_probs])
    counts = torch.cat([torch.arange(len(row.response.token_ids)) >= config.sampling_min_tokens for row in rollouts])
    gap = (engine - log_probs).abs() * counts
    found = {"gap_sum": gap.sum().item(), "gap_max": gap.max().item(), "num_gap_tokens": counts.sum().item()}
    if num_ranks() == 1:
        return found
    lengths = [len(row.response.token_ids) for row in rollouts]
    engines = torch.tensor([row.response.engine for row in rollouts]).repeat_interleave(torch.tensor(lengths))
    for engine in engines.unique().tolist():
        is_its = engines == engine
        found |= {
            f"gap_sum.{engine}": gap[is_its].sum().item(),
            f"num_gap_tokens.{engine}": counts[is_its].sum().item(),
        }
    return found


def check_gap(sums: Mapping[str, float], max_error: float) -> None:
    """Raise a SyncError if an engine's log-probs of its rollouts differ from the policy's by more than the limit.

        error = exp(gap_sum / num_gap_tokens)

    Args:
        sums: those of `measure_gap`. Below MIN_TOKENS_TO_CHECK tokens a mean says little: nothing is raised.
        max_error: the limit, `max_sync_error`.
    """
    suffixes = sorted(name.removeprefix("num_gap_tokens") for name in sums if name.startswith("num_gap_tokens"))
    checked = [part for part in suffixes if sums[f"num_gap_tokens{part}"] >= MIN_TOKENS_TO_CHECK]
    for part in reversed(checked):  # each engine first, and then all of them
        error = torch.tensor(sums[f"gap_sum{part}"] / sums[f"num_gap_tokens{part}"]).exp().item()
        require_small_sync_error(error, max_error, f"engine {part[1:]}" if part else "engine")


def old_log_probs_in(rollouts: Sequence[Rollout]) -> Tensor:
    """Return the old log-probs of all response tokens, one response after the other: (tokens,), in nats."""
    return torch.cat([cast(Tensor, rollout.old_log_probs) for rollout in rollouts])


def summarize_step(
    rollouts: Sequence[Rollout], sync_metrics: Mapping[str, float], seconds: Mapping[str, float], config: RolloutConfig
) -> dict[str, float | None]:
    """Return what is logged once per rollout batch: its responses, the weight sync, the time of each phase, memory.

    `time/step` is the sum of the phases, in seconds. `time/tokens_per_second` is the number of sampled tokens, divided
    by the seconds of the rollout phase.
    """
    num_tokens = sum(len(rollout.response.token_ids) for rollout in rollouts)
    return {
        **summarize_rollouts(rollouts, config),
        **{f"rollout/{name}": value for name, value in sync_metrics.items()},
        **seconds,
        "time/step": sum(seconds.values()),
        "time/tokens_per_second": num_tokens / seconds["time/rollout"],
        "memory/peak_gib": peak_memory_gib(config.policy_device),
    }


def summarize_rollouts(rollouts: Sequence[Rollout], config: RolloutConfig) -> dict[str, float | None]:
    """Return the metrics of a rollout batch, over all its responses. docs/metrics.md defines them."""
    groups = torch.tensor([rollout.rewards["reward"] for rollout in rollouts]).view(-1, config.group_size)
    failures = count_failures([rollout.grading_failure for rollout in rollouts])
    lengths = [len(rollout.response.token_ids) for rollout in rollouts]
    right = [length for length, rollout in zip(lengths, rollouts, strict=True) if rollout.rewards["answer_reward"] == 1]
    wrong = [length for length, rollout in zip(lengths, rollouts, strict=True) if rollout.rewards["answer_reward"] != 1]
    sampled = [value for rollout in rollouts for value in rollout.response.log_probs[config.sampling_min_tokens :]]
    return {
        "rollout/reward": groups.mean().item(),
        "rollout/format_reward": mean([rollout.rewards["format_reward"] for rollout in rollouts]),
        "rollout/answer_reward": mean([rollout.rewards["answer_reward"] for rollout in rollouts]),
        "rollout/reward_std_within_groups": groups.std(dim=1).mean().item() if config.group_size > 1 else None,
        "rollout/all_right_fraction": (groups == 1).all(dim=1).float().mean().item(),
        "rollout/all_wrong_fraction": (groups == 0).all(dim=1).float().mean().item(),
        "rollout/zero_advantage_fraction": mean([float(rollout.advantage == 0) for rollout in rollouts]),
        "rollout/response_length": mean(lengths),
        "rollout/response_length_correct": mean(right),
        "rollout/response_length_incorrect": mean(wrong),
        "rollout/response_length_max": max(lengths),
        "rollout/truncated_fraction": mean([float(rollout.is_truncated) for rollout in rollouts]),
        "rollout/num_sampled_responses": len(rollouts),
        "rollout/num_sampled_tokens": sum(lengths),
        "rollout/token_entropy_estimate": mean([-log_prob for log_prob in sampled]),
        **{f"reward/{name}": count for name, count in failures.items()},
        **{f"reward/{name}": value for name, value in own_means([rollout.rewards for rollout in rollouts]).items()},
    }


def write_rollouts(path: Path, rollouts: Sequence[Rollout], config: RolloutConfig) -> None:
    """Write the first `num_logged_groups` groups of a rollout batch as JSON lines. The first rank does."""
    if rank():
        return
    with path.open("w") as file:
        for rollout in rollouts[: config.num_logged_groups * config.group_size]:
            row = {
                "prompt": rollout.example.prompt,
                "response": rollout.response.text,
                "ground_truth": rollout.example.ground_truth,
                **rollout.rewards,
                "advantage": rollout.advantage,
                "response_length": len(rollout.response.token_ids),
                "finish_reason": rollout.response.finish_reason,
            }
            file.write(json.dumps(row) + "\n")
