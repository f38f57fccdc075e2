"""Which questions are asked and which groups are trained on; dynamic sampling through the whole loop, and resumed."""

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from statistics import fmean, stdev

import pytest
import torch
from kill_and_resume import find_differences
from test_rollouts import tiny_config  # batches of 2 groups of 4
from tiny import FakeEvaluator, grpo_arguments, read_lines, replace_engine, train_rows, write_lines

import GRPO_train
from plainrl import rollouts
from plainrl.data import epoch_order
from plainrl.grading.rewards import Grade
from plainrl.objective import make_loss_inputs
from plainrl.records import Example, Response, Rollout
from plainrl.rollouts import sample_rounds
from plainrl.selection import (
    QuestionOrder,
    choose_batch,
    find_mixed,
    num_questions_to_ask,
    overlong_penalty,
    summarize_selection,
    training_reward,
)


def graded(answers, rewards=None):
    """Rollouts with these answer rewards. Their lengths count from 1, so that each can be told."""
    return [
        Rollout(
            Example("q", "p", "1", None, "s"),
            Response([1], "", [2] * length, [], "stop"),
            {"answer_reward": float(answer), "reward": float(reward), "format_reward": 1.0},
            0.0,
        )
        for length, (answer, reward) in enumerate(zip(answers, rewards or answers, strict=True), start=1)
    ]


def grades(*num_right):
    """Grades of groups of 4 with these numbers of right answers."""
    return [Grade({"answer_reward": float(sample < count)}) for count in num_right for sample in range(4)]


# --- the order of questions -----------------------------------------------------------------------------------------


def test_questions_follow_the_order_of_epochs_however_many_are_drawn_at_once():
    expected = epoch_order(5, 23, seed=7)
    for sizes in ([2] * 11 + [1], [1] * 23, [2, 1, 2, 2] * 3 + [2]):
        order = QuestionOrder(5, tiny_config(seed=7))
        assert [index for size in sizes for index in order.draw(size)] == expected


def test_an_order_goes_on_from_its_state():
    config = tiny_config(drop_solved_questions=True)
    order = QuestionOrder(5, config)
    for _ in range(4):
        order.record(order.draw(2), grades(3, 3))
    solved = order.draw(1)
    order.record(solved, grades(4))
    state = json.loads(json.dumps(order.state_dict()))
    kept = order.state_dict()
    rest = [order.draw(2) for _ in range(9)]
    order.record([0, 1], grades(4, 4))
    assert kept == state  # what was saved does not move on
    other = QuestionOrder(5, config)
    other.load_state_dict(state, step=99)
    assert other.num_solved == 1
    assert [other.draw(2) for _ in range(9)] == rest
    assert not {index for drawn in rest for index in drawn} & set(solved)


def test_a_checkpoint_without_a_state_of_the_order_has_asked_a_batch_in_each_step():
    order = QuestionOrder(5, tiny_config())
    order.load_state_dict({}, step=3)
    assert order.draw(2) + order.draw(2) == epoch_order(5, 10, seed=0)[6:]


def test_a_solved_question_is_passed_over_from_then_on():
    order = QuestionOrder(4, tiny_config(drop_solved_questions=True))
    first_epoch = [*order.draw(2), *order.draw(2)]
    order.record(first_epoch, grades(4, 3, 0, 4))  # 3 of 4 are below 0.9
    assert order.num_solved == 2
    left = set(first_epoch[1:3])
    for _ in range(4):
        assert set(order.draw(2)) == left
    without = QuestionOrder(4, tiny_config())
    without.record(first_epoch, grades(4, 4, 4, 4))
    assert without.num_solved == 0
    assert without.state_dict()["visits"] == {}


def test_several_visits_decide_together():
    order = QuestionOrder(4, tiny_config(drop_solved_questions=True, solved_visits=2, solved_pass_rate=0.8))
    found = []
    for count in (4, 2, 4, 3, 2):  # the means of the last two: -, 6/8, 6/8, 7/8, 5/8
        order.record([1], grades(count))
        found.append(order.num_solved)
    assert found == [0, 0, 0, 1, 0]


def test_a_pass_rate_at_the_limit_counts_exactly():
    """9/10 is 0.9, and so is 36/40 over four visits. The sum of the rounded rates 0.8, 1, 1 and 0.8 is a bit less."""
    sizes = {"group_size": 10, "rollout_batch_size": 20, "train_batch_size": 20}
    for num_right in ([9], [8, 10, 10, 8]):
        order = QuestionOrder(4, tiny_config(drop_solved_questions=True, solved_visits=len(num_right), **sizes))
        for count in num_right:
            order.record([2], [Grade({"answer_reward": float(sample < count)}) for sample in range(10)])
        assert order.num_solved == 1


def test_a_visit_keeps_the_size_of_its_group():
    """A run may be resumed with larger or smaller groups. Older checkpoints hold the sums alone."""
    order = QuestionOrder(4, tiny_config(drop_solved_questions=True))
    order.record([0, 1], grades(4, 2))
    state = json.loads(json.dumps(order.state_dict()))
    older = state | {"visits": {index: [visit[0] for visit in visits] for index, visits in state["visits"].items()}}
    for saved, group_size, num_solved in ((state, 2, 1), (state, 8, 1), (older, 4, 1), (older, 2, 2)):
        sizes = {"group_size": group_size, "rollout_batch_size": 16, "train_batch_size": 16}
        resumed = QuestionOrder(4, tiny_config(drop_solved_questions=True, **sizes))
        resumed.load_state_dict(saved, step=1)
        assert resumed.num_solved == num_solved


def test_if_too_few_questions_are_left_all_are_asked_again(capsys):
    order = QuestionOrder(4, tiny_config(drop_solved_questions=True))
    order.record([0, 1], grades(4, 4))
    assert set(order.draw(2)) == {2, 3}  # two are left, which is a step's
    assert capsys.readouterr().out == ""
    order.record([2], grades(4))
    assert order.num_solved == 3
    seen = {index for _ in range(4) for index in order.draw(2)}
    assert seen == {0, 1, 2, 3} and order.num_solved == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line == ("3 of 4 training questions are solved, and the other 1 are too few for a step: all are asked again")


def test_a_question_is_asked_even_if_a_changed_limit_makes_all_of_them_solved():
    order = QuestionOrder(4, tiny_config(drop_solved_questions=True))
    order.record([0, 1, 2, 3], grades(2, 2, 2, 2))
    resumed = QuestionOrder(4, tiny_config(drop_solved_questions=True, solved_pass_rate=0.5))
    resumed.load_state_dict(order.state_dict(), step=2)
    assert resumed.num_solved == 4
    assert len(resumed.draw(2)) == 2


# --- the groups of a batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_sampled", "num_mixed", "expected"),
    [
        (16, 16, 0),
        (20, 17, 0),
        (16, 8, 16),  # half are mixed: 8 more need 16
        (32, 15, 3),  # 1 more needs 32/15
        (16, 12, 6),  # 4 more need 16/3
        (16, 1, 16),  # 15 more would need 240: a batch at most
        (16, 0, 16),
    ],
)
def test_as_many_questions_are_asked_as_the_share_of_mixed_groups_says(num_sampled, num_mixed, expected):
    assert num_questions_to_ask(num_sampled, num_mixed, num_wanted=16) == expected


def test_mixed_groups_are_those_whose_answers_differ_whatever_the_reward():
    answers = [1, 1, 0, 0, 1, 0, 0.5, 0.5, 0.5, 0]
    rewards = [1.0, 0.2, 0.1, 0.0, 1, 1, 0.5, 0.5, 1, 1]
    assert find_mixed(graded(answers, rewards), 2) == [False, False, True, False, True]


def lengths(batch):
    return [len(rollout.response.token_ids) for rollout in batch]


def test_a_batch_has_the_first_mixed_groups_in_the_order_drawn():
    right, wrong, mixed = [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]
    config = tiny_config(dynamic_sampling=True)
    of_group = [list(range(4 * group + 1, 4 * group + 5)) for group in range(4)]
    assert lengths(choose_batch(graded(right + mixed + wrong + mixed), config)) == of_group[1] + of_group[3]
    assert lengths(choose_batch(graded(mixed * 4), config)) == of_group[0] + of_group[1]  # others are left over
    assert lengths(choose_batch(graded(right + wrong + mixed), config)) == of_group[0] + of_group[2]  # filled up
    assert lengths(choose_batch(graded(right + wrong), config)) == of_group[0] + of_group[1]
    everything = graded(right + mixed + wrong + mixed)
    assert choose_batch(everything, tiny_config()) == everything


def test_the_overlong_penalty_is_that_of_dapo():
    """Equation 13, written out: 0 up to L_max - L_cache, then a line down to -1 at L_max."""
    for num_tokens in range(1, 21):
        expected = 0.0 if num_tokens <= 12 else (12 - num_tokens) / 8 if num_tokens <= 20 else -1.0
        assert overlong_penalty(num_tokens, max_tokens=20, cache_tokens=8) == expected
        assert overlong_penalty(num_tokens, max_tokens=20, cache_tokens=0) == 0.0
    assert overlong_penalty(99, max_tokens=20, cache_tokens=8) == -1.0


def test_the_penalty_reaches_advantages_and_losses_but_neither_filter_nor_metrics():
    config = tiny_config(sampling_max_tokens=8, overlong_cache_tokens=4, dynamic_sampling=True)
    made = graded([1, 1, 1, 1, 0, 0, 1, 0])  # lengths 1 to 8
    assert [training_reward(rollout, config) for rollout in made] == [1, 1, 1, 1, -0.25, -0.5, 0.25, -1]
    assert find_mixed(graded([0] * 8), 4) == [False, False]  # though the penalties differ
    order = QuestionOrder(4, config)
    found = summarize_selection(made, 1, order, 1, config)
    assert found["rollout/overlong_penalty"] == pytest.approx(-(0.25 + 0.5 + 0.75 + 1) / 8)
    assert rollouts.summarize_rollouts(made, config)["rollout/reward"] == 5 / 8

    # no_baseline: a wrong answer that is too long has a reward below zero, so it is trained on
    raw = tiny_config(sampling_max_tokens=8, overlong_cache_tokens=4, loss_type="no_baseline")
    rows, _ = GRPO_train.rows_to_train_on(made, raw)
    assert lengths(rows) == list(range(1, 9))
    assert lengths(GRPO_train.rows_to_train_on(made, tiny_config(loss_type="no_baseline"))[0]) == [1, 2, 3, 4, 7]
    inputs = make_loss_inputs(made, torch.zeros(8, 8), torch.ones(8, 8, dtype=torch.bool), raw)
    assert inputs.raw_rewards.flatten().tolist() == [1, 1, 1, 1, -0.25, -0.5, 0.25, -1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlong_cache_tokens": 17}, "overlong_cache_tokens = 17 exceeds sampling_max_tokens = 16"),
        (
            {"dynamic_sampling": True, "group_size": 1, "loss_type": "no_baseline"},
            "dynamic_sampling = true with group_size = 1",
        ),
        ({"solved_pass_rate": 0.0}, "greater than 0"),
        ({"max_resampling_rounds": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_settings_without_their_switch_are_announced():
    settings = {"max_resampling_rounds": 3, "solved_pass_rate": 0.5, "solved_visits": 2}
    found = tiny_config(**settings).warnings()
    assert {line.partition(" = ")[0] for line in found if "without" in line} == set(settings)
    switched = tiny_config(dynamic_sampling=True, drop_solved_questions=True, **settings).warnings()
    assert not [line for line in switched if "without" in line]


# --- rounds of sampling ---------------------------------------------------------------------------------------------


class Engine:
    """In place of the engine's stream: notes each call, and answers 6 where `is_right` says so."""

    def __init__(self, is_right):
        self.is_right, self.calls = is_right, []

    def __call__(self, llm, prompt_ids, sampling_params, seeds, **_):
        self.calls.append((prompt_ids, list(seeds)))
        for position, (ids, seed) in enumerate(zip(prompt_ids, seeds, strict=True)):
            answer = 6 if self.is_right(ids[0], seed) else 5
            yield position, Response(ids, f"</think> <answer> {answer} </answer>", [1, 2], [-1.0, -1.0], "stop")


QUESTIONS = [Example(f"q{index}", f"p{index}", "6", None, "s") for index in range(6)]
PROMPTS = [[index] for index in range(6)]


def run_rounds(monkeypatch, is_right, num_steps=1, **settings):
    """Sample some steps; return the last, and the engine with its calls."""
    engine = Engine(is_right)
    replace_engine(monkeypatch, engine)
    config = tiny_config(**settings)
    order = QuestionOrder(len(QUESTIONS), config)
    with ThreadPoolExecutor(2) as threads:
        for step in range(1, num_steps + 1):
            sampled = sample_rounds(None, QUESTIONS, PROMPTS, order, step, config, threads)
    return sampled, engine


def test_without_dynamic_sampling_a_step_is_one_round(monkeypatch):
    sampled, engine = run_rounds(monkeypatch, lambda *_: False)
    assert len(sampled.rounds) == len(engine.calls) == 1
    assert sampled.chosen == epoch_order(6, 2, seed=0)
    none_left, other = run_rounds(monkeypatch, lambda *_: False, dynamic_sampling=True, max_resampling_rounds=0)
    assert other.calls == engine.calls  # the same prompts and seeds
    assert none_left.chosen == sampled.chosen


def test_questions_are_asked_until_enough_groups_are_mixed(monkeypatch):
    """Of the order a b c d ..., only c and e are mixed: rounds a b | c d | e f, as 1 missing of a share 1/4 needs 4."""
    order = epoch_order(6, 6, seed=0)
    sampled, engine = run_rounds(
        monkeypatch, lambda question, seed: question in (order[2], order[4]) and seed % 2, dynamic_sampling=True
    )
    assert sampled.chosen == order and len(sampled.rounds) == 3
    assert [len(seeds) for _, seeds in engine.calls] == [8, 8, 8]
    assert [response.prompt_ids[0] for response in sampled.responses] == [index for index in order for _ in range(4)]
    found = find_mixed(sampled.wait_for_grades(), 4)
    assert found == [False, False, True, False, True, False]
    turns = cycle([True, False])
    sampled, _ = run_rounds(monkeypatch, lambda *_: next(turns), dynamic_sampling=True)
    assert len(sampled.rounds) == 1  # enough at once


def test_the_rounds_end_and_every_request_has_a_seed_of_its_own(monkeypatch):
    """Nothing is ever right: 8 further rounds of a batch, 18 questions of 6, so that each comes three times."""
    sampled, engine = run_rounds(monkeypatch, lambda *_: False, dynamic_sampling=True)
    assert len(sampled.rounds) == len(engine.calls) == 9
    assert sampled.chosen == epoch_order(6, 18, seed=0)
    seeds = [seed for _, seeds in engine.calls for seed in seeds]
    assert len(set(seeds)) == len(seeds) == 18 * 4
    sampled, engine = run_rounds(monkeypatch, lambda *_: False, dynamic_sampling=True, max_resampling_rounds=2)
    assert len(sampled.rounds) == len(engine.calls) == 3


def test_the_next_step_goes_on_where_the_last_round_ended(monkeypatch):
    sampled, _ = run_rounds(monkeypatch, lambda *_: False, num_steps=2, dynamic_sampling=True, max_resampling_rounds=1)
    assert sampled.chosen == epoch_order(6, 8, seed=0)[4:]


def test_the_last_round_is_graded_while_the_engine_goes_to_sleep(monkeypatch):
    """Only grades that decide on a further round are waited for: here none is."""
    may_grade, graded = threading.Event(), []

    def slowly(*_):
        may_grade.wait(60)
        graded.append(1)
        return Grade({"answer_reward": 0.0})

    monkeypatch.setattr(rollouts, "grade_response", slowly)
    replace_engine(monkeypatch, Engine(lambda *_: False))
    config = tiny_config()
    with ThreadPoolExecutor(2) as threads:
        sampled = sample_rounds(None, QUESTIONS, PROMPTS, QuestionOrder(6, config), 1, config, threads)
        assert not graded
        may_grade.set()
        assert len(sampled.wait_for_grades()) == len(graded) == len(sampled.responses)


# --- the whole loop, without vLLM -----------------------------------------------------------------------------------


@pytest.fixture
def guessing_engine(monkeypatch):
    """GRPO_train with an engine that guesses by its seeds: a question is answered right in a share of its own."""

    class GuessingEvaluator(FakeEvaluator):
        llm = None

    def stream_responses(llm, prompt_ids, sampling_params, seeds, **_):
        for position, (ids, seed) in enumerate(zip(prompt_ids, seeds, strict=True)):
            guess = random.Random(seed)
            share = random.Random(str(ids)).choice([0.0, 0.2, 0.6, 1.0])
            answer = 6 if guess.random() < share else 5
            tokens = [guess.randrange(10, 500) for _ in range(guess.randrange(2, 12))]
            text = f"</think> <answer> {answer} </answer>"
            yield position, Response(ids, text, tokens, [-6.0] * len(tokens), "stop")

    monkeypatch.setattr(GRPO_train, "Evaluator", GuessingEvaluator)
    replace_engine(monkeypatch, stream_responses)


def run_grpo(model, folder, name, **overrides):
    """A run on 12 questions of the answer 6; return its folder."""
    files = {}
    for key, first in (("train_data", 1), ("validation_data", 100)):
        rows = [{"problem": f"What is {number} - {number} + 6?", "answer": "6"} for number in range(first, first + 12)]
        files[key] = write_lines(folder / f"{key}.jsonl", rows)
    values = {"run_name": name, "n_grpo_steps": 5, "checkpoint_interval": 2, "max_sync_error": 1e9, "eval_interval": 5}
    GRPO_train.main(grpo_arguments(model, folder, **(files | values | overrides)))
    return folder / name


SELECTION = {"dynamic_sampling": True, "max_resampling_rounds": 3, "drop_solved_questions": True}


@pytest.mark.usefixtures("cpu_engine", "guessing_engine")
def test_a_stopped_run_with_dynamic_sampling_is_resumed_bit_for_bit(tiny_model_folder, tmp_path, monkeypatch):
    """Stopped within a step whose questions are drawn already; the questions of its 5 steps span several epochs."""
    settings = SELECTION | {"overlong_cache_tokens": 8}
    straight = run_grpo(tiny_model_folder, tmp_path, "straight", **settings)
    original = GRPO_train.update_policy

    def stopped(*arguments):
        if arguments[4] == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GRPO_train, "update_policy", stopped)
        run_grpo(tiny_model_folder, tmp_path, "stopped", **settings)
    assert (tmp_path / "stopped/checkpoints/step_000003").is_dir()
    resumed = run_grpo(tiny_model_folder, tmp_path, "stopped", resume=tmp_path / "stopped", **settings)
    assert find_differences(straight, resumed) == []

    rows = train_rows(straight)
    num_questions = sum(row["rollout/num_sampled_responses"] for row in rows) / 4
    assert num_questions > 24  # over two epochs of 12
    assert max(row["rollout/num_solved_questions"] for row in rows) > 0
    assert any(row["rollout/resampling_rounds"] for row in rows[:3])  # else the position would follow from the step


@pytest.mark.usefixtures("cpu_engine", "guessing_engine")
def test_metrics_cover_all_that_was_sampled_and_the_batch_is_mixed(tiny_model_folder, tmp_path):
    plain = run_grpo(tiny_model_folder, tmp_path, "plain", n_grpo_steps=2)
    dynamic = run_grpo(tiny_model_folder, tmp_path, "dynamic", n_grpo_steps=2, num_logged_groups=9, **SELECTION)
    assert {key for row in train_rows(plain) for key in row} == {key for row in train_rows(dynamic) for key in row}
    for row in train_rows(plain):
        assert (row["rollout/num_sampled_responses"], row["rollout/resampling_rounds"]) == (8, 0)
        assert row["rollout/num_dropped_groups"] == row["rollout/overlong_penalty"] == 0
    for row in train_rows(dynamic):
        num_groups = row["rollout/num_sampled_responses"] / 4
        assert row["rollout/num_dropped_groups"] == num_groups - 2
        assert 0 < row["rollout/num_mixed_groups"] <= num_groups
        unmixed = row["rollout/all_right_fraction"] + row["rollout/all_wrong_fraction"]
        assert unmixed == pytest.approx(1 - row["rollout/num_mixed_groups"] / num_groups)
        assert row["time/tokens_per_second"] == pytest.approx(row["rollout/num_sampled_tokens"] / row["time/rollout"])
        samples = read_lines(dynamic / f"samples/rollouts_{row['train_step']:06d}.jsonl")
        assert len(samples) == 8  # of the batch alone
        assert row["train/num_trained_rows"] == sum(sample["advantage"] != 0 for sample in samples)
        assert 1 - row["rollout/zero_advantage_fraction"] == pytest.approx(
            row["train/num_trained_rows"] / row["rollout/num_sampled_responses"]
        )
    assert any(row["rollout/num_dropped_groups"] for row in train_rows(dynamic))


@pytest.mark.usefixtures("cpu_engine", "guessing_engine")
def test_the_loop_normalizes_reward_plus_penalty_within_each_group(tiny_model_folder, tmp_path):
    run = run_grpo(tiny_model_folder, tmp_path, "run", n_grpo_steps=3, num_logged_groups=2, overlong_cache_tokens=8)
    found, expected = [], []
    for path in sorted((run / "samples").glob("rollouts_*")):
        rows = read_lines(path)
        rewards = [row["reward"] - max(row["response_length"] - 8, 0) / 8 for row in rows]
        for group in (rewards[:4], rewards[4:]):
            scale = stdev(group) + 1e-6
            expected += [(value - fmean(group)) / scale for value in group]
        found += [row["advantage"] for row in rows]
    assert found == pytest.approx(expected, abs=1e-5) and any(expected)


@pytest.mark.usefixtures("cpu_engine", "guessing_engine")
def test_with_no_further_round_the_run_is_the_same_as_without_dynamic_sampling(tiny_model_folder, tmp_path):
    plain = run_grpo(tiny_model_folder, tmp_path, "plain", n_grpo_steps=3)
    other = run_grpo(
        tiny_model_folder, tmp_path, "other", n_grpo_steps=3, dynamic_sampling=True, max_resampling_rounds=0
    )
    assert find_differences(plain, other) == []
