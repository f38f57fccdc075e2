"""Responses to a step's questions: sampled with seeds of their own, graded meanwhile, kept in order, summarized."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import read_lines, replace_engine

from GRPO_helper import normalize_within_groups
from plainrl import rollouts
from plainrl.config import ExpertIterationConfig, GRPOConfig
from plainrl.engine import SyncError
from plainrl.grading.rewards import Grade, grade_responses
from plainrl.records import Example, Response
from plainrl.rollouts import (
    make_rollouts,
    measure_gap,
    old_log_probs_in,
    sample_groups,
    summarize_rollouts,
    summarize_step,
    thread_pool,
    write_rollouts,
)


def tiny_config(**overrides):
    values = {"rollout_batch_size": 8, "train_batch_size": 8, "group_size": 4, "gradient_accumulation_steps": 1}
    return GRPOConfig(**(values | {"sampling_max_tokens": 16} | overrides))


@pytest.mark.parametrize(
    ("config", "reads_them"),
    [
        (tiny_config(), True),
        (tiny_config(sampling_temperature=0.7), True),
        (tiny_config(sampling_top_p=0.7), False),  # then probes check the sync
        (ExpertIterationConfig(ei_batch_size=2, group_size=4, sampling_max_tokens=16), False),
    ],
)
def test_log_probs_are_asked_for_only_where_something_reads_them(config, reads_them, monkeypatch):
    def stream_responses(llm, prompt_ids, sampling_params, seeds, with_log_probs):
        assert with_log_probs == reads_them
        return ((index, Response(ids, "5", [1], [], "stop")) for index, ids in enumerate(prompt_ids))

    replace_engine(monkeypatch, stream_responses)
    questions = [Example("q", "p", "6", None, "s")] * 2
    with ThreadPoolExecutor(1) as threads:
        responses, _ = sample_groups(None, questions, [[0], [1]], [0, 1], 1, config, threads)
    assert len(responses) == 8


def test_responses_are_graded_while_others_are_sampled(monkeypatch):
    """The first to finish is the last of its group; it is graded before the second is there, and keeps its place."""
    graded = []

    def stream_responses(llm, prompt_ids, sampling_params, seeds, **_):
        for index in reversed(range(8)):
            text = f"</think> <answer> {index} </answer>"
            yield index, Response(prompt_ids[index], text, [index], [0.0], "stop")
            assert graded[-1].result(timeout=60).rewards["answer_reward"] == float(index == 6)

    class Threads(ThreadPoolExecutor):
        def submit(self, *arguments):
            graded.append(super().submit(*arguments))
            return graded[-1]

    replace_engine(monkeypatch, stream_responses)
    questions = [Example(f"q{i}", f"p{i}", "6", None, "s") for i in range(3)]
    with Threads(2) as threads:
        responses, wait_for_grades = sample_groups(None, questions, [[0], [1], [2]], [2, 0], 1, tiny_config(), threads)
    assert [response.token_ids for response in responses] == [[index] for index in range(8)]
    assert [response.prompt_ids for response in responses] == [[2]] * 4 + [[0]] * 4
    assert [grade.rewards["reward"] for grade in wait_for_grades()] == [0, 0, 0, 0, 0, 0, 1, 0]


@pytest.fixture
def seeds_used(monkeypatch):
    """The seeds of the samples that are asked for, in their order."""
    seen = []

    def stream_responses(llm, prompt_ids, sampling_params, seeds, **_):
        seen.extend(seeds)
        yield from ((index, Response(ids, "", [1], [0.0], "stop")) for index, ids in enumerate(prompt_ids))

    replace_engine(monkeypatch, stream_responses)
    return seen


def sample_two_questions(chosen, step, config):
    questions = [Example("q", "p", "6", None, "s")] * 2
    with ThreadPoolExecutor(1) as threads:
        sample_groups(None, questions, [[0], [1]], chosen, step, config, threads)


def test_a_question_that_comes_twice_in_a_batch_is_sampled_anew(seeds_used):
    for chosen in ([0, 1], [0, 1, 0]):
        sample_two_questions(chosen, 1, tiny_config())
    assert seeds_used[:8] == seeds_used[8:16]  # those of the first time are as ever
    assert len(set(seeds_used[8:])) == 12


def test_a_sample_has_another_seed_in_each_step_and_run(seeds_used):
    for step, config in ((1, tiny_config()), (2, tiny_config()), (1, tiny_config(seed=1))):
        sample_two_questions([0, 1], step, config)
    assert len(set(seeds_used)) == len(seeds_used) == 24


def test_grading_keeps_rewards_groups_and_order():
    answers = ["1", "2", "1", "1", "4", "4", "4", "4"]
    responses = [Response([1], f"</think> <answer> {answer} </answer>", [2], [0.0], "stop") for answer in answers]
    questions = [Example("q1", "p1", "1", None, "s"), Example("q2", "p2", "4", None, "s")]
    grades = grade_responses([response.text for response in responses], ["1"] * 4 + ["4"] * 4, "r1_zero")
    rewards = torch.tensor([grade.rewards["reward"] for grade in grades])
    advantages = normalize_within_groups(rewards, 4, 1e-6, normalize_by_std=True).tolist()
    made = make_rollouts(questions, responses, grades, advantages, group_size=4)
    assert [rollout.rewards["reward"] for rollout in made] == [1, 0, 1, 1, 1, 1, 1, 1]
    assert [rollout.example.question for rollout in made] == ["q1"] * 4 + ["q2"] * 4
    assert made[1].advantage == pytest.approx(-1.5, abs=1e-4)
    assert [rollout.advantage for rollout in made[4:]] == [0.0] * 4
    metrics = summarize_rollouts(made, tiny_config())
    assert metrics["rollout/reward"] == 7 / 8
    assert (metrics["rollout/all_right_fraction"], metrics["rollout/all_wrong_fraction"]) == (0.5, 0.0)
    assert metrics["rollout/zero_advantage_fraction"] == 0.5
    assert metrics["rollout/reward_std_within_groups"] == pytest.approx(0.25)


def made_up_rollouts(lengths):
    """A group of four: one correct, one cut, one that could not be graded; a log-prob of the engine for each token."""
    responses = [
        Response([1], f"text {index}", [2] * length, [-1.0 - index] * length, "length" if index == 2 else "stop")
        for index, length in enumerate(lengths)
    ]
    rewards = [
        {"reward": 0.5 * (index == 0), "answer_reward": float(index == 0), "format_reward": float(index < 3)}
        for index in range(4)
    ]
    grades = [Grade(reward, "timeout" if index == 3 else None) for index, reward in enumerate(rewards)]
    return make_rollouts([Example("q", "p", "1", None, "s")], responses, grades, [1.5, -0.5, -0.5, -0.5], 4)


def test_the_gap_leaves_the_first_tokens_of_each_response_out():
    made = made_up_rollouts([3, 1, 2, 4])
    policy = torch.tensor([-1.0, -1.0, -1.5, -9.0, -3.0, -3.25, -4.0, -9.0, -4.0, -4.125])
    gap = measure_gap(made, policy, tiny_config(sampling_min_tokens=1))
    # from the second token on: 0, 0.5 | - | 0.25 | 5, 0, 0.125
    assert gap == {"gap_sum": 5.875, "gap_max": 5.0, "num_gap_tokens": 6}
    assert measure_gap(made, policy, tiny_config(sampling_min_tokens=0))["num_gap_tokens"] == 10


def test_a_gap_over_few_tokens_says_too_little_to_end_a_run(monkeypatch):
    monkeypatch.setattr(rollouts, "MIN_TOKENS_TO_CHECK", 3)

    def sums(error, num_tokens, engine=""):
        return {f"gap_sum{engine}": math.log(error) * num_tokens, f"num_gap_tokens{engine}": num_tokens}

    rollouts.check_gap({}, 1.1)
    rollouts.check_gap(sums(1.09, 9), 1.1)
    rollouts.check_gap(sums(2.0, 2), 1.1)
    for error in (1.2, math.inf, math.nan):
        with pytest.raises(SyncError, match="engine and policy disagree .*max_sync_error = 1.1"):
            rollouts.check_gap(sums(error, 3), 1.1)
    one_of_many = sums(1.01, 99) | sums(1.0, 90, ".0") | sums(1.1, 9, ".7")
    with pytest.raises(SyncError, match="engine 7 and policy disagree"):
        rollouts.check_gap(one_of_many, 1.05)


def test_with_several_ranks_the_gap_is_measured_of_each_engine(monkeypatch):
    monkeypatch.setattr(rollouts, "num_ranks", lambda: 2)
    made = made_up_rollouts([3, 1, 2, 4])
    for rollout, engine in zip(made, (0, 1, 1, 0), strict=True):
        rollout.response = rollout.response._replace(engine=engine)
    policy = torch.tensor([-1.0, -1.0, -1.5, -9.0, -3.0, -3.25, -4.0, -9.0, -4.0, -4.125])
    gap = measure_gap(made, policy, tiny_config(sampling_min_tokens=1))
    assert gap == {
        **{"gap_sum": 5.875, "gap_max": 5.0, "num_gap_tokens": 6},
        **{"gap_sum.0": 5.625, "num_gap_tokens.0": 5, "gap_sum.1": 0.25, "num_gap_tokens.1": 1},
    }


def test_old_log_probs_follow_each_other():
    made = made_up_rollouts([1, 2, 1, 1])
    for index, rollout in enumerate(made):
        rollout.old_log_probs = torch.full((len(rollout.response.token_ids),), -float(index))
    assert old_log_probs_in(made).tolist() == [0, -1, -1, -2, -3]


def test_a_step_is_summarized_over_all_its_responses():
    made = made_up_rollouts([3, 1, 2, 4])
    seconds = {"time/rollout": 2.0, "time/train": 3.0}
    summary = summarize_step(made, {"sync_multiplicative_error": 1.5}, seconds, tiny_config())
    assert summary["rollout/response_length"] == 2.5
    names = ("reward", "answer_reward", "format_reward")
    assert [summary[f"rollout/{name}"] for name in names] == [0.125, 0.25, 0.75]
    assert summary["rollout/response_length_correct"] == 3
    assert summary["rollout/response_length_incorrect"] == pytest.approx(7 / 3)
    assert summary["rollout/response_length_max"] == 4
    assert summary["rollout/truncated_fraction"] == 0.25
    assert summary["rollout/token_entropy_estimate"] is None  # no response has more tokens than sampling_min_tokens
    assert (summary["reward/timeouts"], summary["reward/errors"]) == (1, 0)
    assert summary["rollout/sync_multiplicative_error"] == 1.5
    assert (summary["time/step"], summary["time/rollout"], summary["time/train"]) == (5.0, 2.0, 3.0)
    assert summary["time/tokens_per_second"] == 5.0
    assert (summary["rollout/num_sampled_responses"], summary["rollout/num_sampled_tokens"]) == (4, 10)
    # from the second token on: 1, 1 | - | 3 | 4, 4, 4
    later = summarize_rollouts(made, tiny_config(sampling_min_tokens=1))
    assert later["rollout/token_entropy_estimate"] == pytest.approx(17 / 6)
    nothing_right = summarize_rollouts(made[1:], tiny_config(group_size=1, loss_type="no_baseline"))
    assert nothing_right["rollout/response_length_correct"] is None
    assert nothing_right["rollout/reward_std_within_groups"] is None


def test_the_first_groups_are_written_down(tmp_path):
    made = made_up_rollouts([1, 2, 3, 4]) + made_up_rollouts([5, 6, 7, 8])
    write_rollouts(tmp_path / "rollouts.jsonl", made, tiny_config(num_logged_groups=1))
    rows = read_lines(tmp_path / "rollouts.jsonl")
    assert [row["response"] for row in rows] == ["text 0", "text 1", "text 2", "text 3"]
    assert [row["advantage"] for row in rows] == [1.5, -0.5, -0.5, -0.5]
    assert [row["response_length"] for row in rows] == [1, 2, 3, 4]
    assert [row["finish_reason"] for row in rows] == ["stop", "stop", "length", "stop"]
    assert set(rows[0]) == {
        *("prompt", "response", "ground_truth", "reward", "format_reward", "answer_reward"),
        *("advantage", "response_length", "finish_reason"),
    }


def test_an_error_does_not_wait_for_threads():
    """What is queued is given up: a run that is stopped saves its state at once."""
    is_free, started = threading.Event(), []
    with pytest.raises(RuntimeError, match="stop"), thread_pool(1) as threads:
        futures = [threads.submit(lambda: started.append(is_free.wait(60))) for _ in range(3)]
        raise RuntimeError("stop")
    assert started == []
    assert all(future.cancelled() for future in futures[1:])
    is_free.set()
