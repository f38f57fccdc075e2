"""Reward functions of the user's own: fields by name, what they return, sums, mistakes that cost one response."""

import json
import threading
import time
from pathlib import Path

import pytest
from tiny import REPOSITORY

from plainrl.cli import load_config
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.data import load_questions, load_validation
from plainrl.grading import own_rewards
from plainrl.grading.own_rewards import RewardError, call_reward
from plainrl.grading.rewards import Reward, grade_responses, own_means
from plainrl.records import Example, Fields, Response, UserError
from plainrl.reward_names import find_reward, read_terms
from plainrl.rollouts import make_rollouts, summarize_rollouts
from policy_evaluation import summarize_evaluation

MY_REWARDS = """
import time

def by_level(response, ground_truth, level, question, weight=2.0):
    return {"reward": weight * level * (response == ground_truth), "asked": float(len(question))}

def everything(response, ground_truth, **fields):
    return float(len(fields))

def brief(response, ground_truth):
    return {"reward": 1.0 if len(response) < 4 else 0.0, "length": len(response)}

def half(response, ground_truth):
    return 0.5

def odd(response, ground_truth):
    if response == "raise":
        return {}["gone"]
    if response == "exit":
        raise SystemExit(3)
    if response == "sleep":
        time.sleep(60)
    if response == "spin":
        while True:
            pass
    results = {"none": None, "nan": float("nan"), "text": "high", "taken": {"reward": 1.0, "response": 2.0}}
    return results.get(response, 1)

def alone(response):
    return 1.0
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "my.py").write_text(MY_REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_rewards, "_said", set())
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_reward_gets_the_fields_that_it_names_and_no_others():
    fields = {"level": 3, "question": "2 + 2?", "subject": "sums"}
    assert grade_responses(["4"], ["4"], find_reward("my.py:by_level"), [fields])[0].rewards == {
        "reward": 6.0, "asked": 6.0, "answer_reward": 6.0, "format_reward": 1.0
    }  # fmt: skip
    heavier = [fields | {"weight": 0.5}]
    assert grade_responses(["4"], ["4"], find_reward("my.py:by_level"), heavier)[0].rewards["reward"] == 1.5
    assert grade_responses(["4"], ["4"], find_reward("my.py:everything"), [fields])[0].rewards["reward"] == 3
    of_the_data = [fields | {"response": "a trace", "ground_truth": "4"}]  # columns that its parameters are called like
    assert grade_responses(["4"], ["4"], find_reward("my.py:everything"), of_the_data)[0].rewards["reward"] == 3
    assert grade_responses(["4"], ["4"], find_reward("my.py:half"), [fields])[0].rewards["reward"] == 0.5


def test_columns_of_the_data_reach_the_reward_from_every_layout(folder):
    rows = [{"problem": f"{n} + 1?", "answer": n + 1, "level": n, "other": [n]} for n in range(40)]
    data = {"train_data": write(folder / "t.jsonl", rows[4:]), "validation_data": write(folder / "v.jsonl", rows[:4])}
    sizes = {"rollout_batch_size": 8, "train_batch_size": 8, "gradient_accumulation_steps": 1}
    config = GRPOConfig(reward="my.py:by_level", **sizes, **data)
    validation = load_validation(config)
    assert [example.fields for example in validation.everything] == [{"level": n} for n in range(4)]
    assert [example.fields["level"] for example in load_questions(validation.everything, config)] == list(range(4, 40))
    given = validation.everything[1].reward_fields
    assert given == {"level": 1, "question": "1 + 1?", "prompt": validation.everything[1].prompt}
    lines = ["problem,answer,level", *(f"{row['problem']},{row['answer']},{row['level']}" for row in rows)]
    (folder / "v.csv").write_text("\n".join(lines))
    of_csv = config.model_copy(update={"validation_data": "v.csv"})
    assert load_validation(of_csv).everything[7].fields == {"level": "7"}  # a CSV holds text
    every = config.model_copy(update={"reward": "my.py:everything"})
    assert load_validation(every).everything[3].fields == rows[3]


def test_columns_of_a_parquet_file_are_read_if_a_reward_asks_for_them(folder):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"problem": ["1 + 1?"], "answer": ["2"], "level": [5], "unused": [b"\xff"]})
    parquet.write_table(table, folder / "v.parquet")
    config = SFTConfig(reward="my.py:by_level", validation_data="v.parquet", num_eval_examples="all")
    assert load_validation(config).everything[0].fields == {"level": 5}


def test_a_field_that_the_data_lacks_is_one_line_before_anything_starts(folder):
    data = write(folder / "v.jsonl", [{"problem": "1 + 1?", "answer": "2", "lvl": 1}])
    with pytest.raises(UserError) as caught:
        load_validation(SFTConfig(reward="my.py:by_level", validation_data=data))
    assert str(caught.value) == (
        f"reward = my.py:by_level: it asks for level, which {data}, line 1 does not have; it has prompt, question; add "
        "the column, or give the parameter a default"
    )
    with pytest.raises(UserError, match="it asks for level, which arithmetic validation, question 1 does not have"):
        load_validation(SFTConfig(reward="my.py:by_level"))


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        ("none", "returned None: return a finite number, or a dictionary of them with the key 'reward'"),
        ("nan", "returned nan: return a finite number"),
        ("text", "returned 'high': return a finite number"),
        ("taken", "returned the key 'response': rename it"),
        ("raise", "raised KeyError in line 18: 'gone'"),
        ("exit", "raised SystemExit in line 20: 3"),
    ],
)
def test_a_mistake_costs_one_response_and_is_said_once(response, problem, capsys):
    responses = ["fine", response, "fine", response]
    grades = grade_responses(responses, ["1"] * 4, find_reward("my.py:odd"))
    assert [grade.rewards["reward"] for grade in grades] == [1, 0, 1, 0]
    assert [grade.failure for grade in grades] == [None, "error", None, "error"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: the reward function my.py:odd {problem}")
    with pytest.raises(RewardError, match=r"^the reward function my\.py:odd .* \(so did each of 2 responses\)$"):
        grade_responses([response] * 2, ["1"] * 2, find_reward("my.py:odd"))


@pytest.mark.parametrize("response", ["sleep", "spin"])
def test_a_call_that_does_not_end_costs_one_response(response):
    """Whether it waits or computes. The next call has a thread of its own, and a busy one is stopped."""
    reward = find_reward("my.py:odd", max_seconds=2)
    waiting, before = num_given_up(), time.monotonic()
    grades = grade_responses(["fine", response, "fine"], ["1"] * 3, reward)
    assert time.monotonic() - before < 10
    assert [grade.failure for grade in grades] == [None, "timeout", None]
    assert "my.py:odd took longer than max_reward_seconds = 2" in (grades[1].problem or "")
    deadline = time.monotonic() + 10
    while response == "spin" and num_given_up() > waiting and time.monotonic() < deadline:
        time.sleep(0.05)
    assert num_given_up() - waiting == (response == "sleep")  # which Python cannot wake up


def num_given_up():
    """Threads whose call was given up and has not ended."""
    return sum(getattr(thread, "is_given_up", False) for thread in threading.enumerate())


def test_a_reward_may_call_another_within_its_limit():
    inner = find_reward("my.py:half", max_seconds=5)

    def outer(response, truth):
        return grade_responses([response], [truth], inner)[0].rewards["reward"] * 2

    assert call_reward(outer, "a", "1", {}, max_seconds=5)["reward"] == 1.0


def test_a_function_that_cannot_be_called_so_is_refused_at_once():
    with pytest.raises(
        UserError, match=r"^reward = my.py:alone: the reward function my.py:alone takes \(response\): let"
    ):
        find_reward("my.py:alone")
    with pytest.raises(ValueError, match="my.py:alone takes"):
        SFTConfig(reward="my.py:alone")


def test_a_weighted_sum_of_rewards():
    r"""0.9 of the built-in one and 0.2 of "brief"; right and brief: 0.9 + 0.2; format and answer are the built-in's."""
    reward = SFTConfig(reward="question_only*0.9 + my.py:brief*0.2").reward_function
    responses = [r"\boxed{4}", r"\boxed{5}", "4"]
    grades = grade_responses(responses, ["4"] * 3, reward)
    assert [grade.rewards["reward"] for grade in grades] == pytest.approx([0.9, 0.0, 0.2])
    assert [grade.rewards["answer_reward"] for grade in grades] == [1, 0, 0]
    assert [grade.rewards["format_reward"] for grade in grades] == [1, 1, 0]
    assert [grade.rewards["brief_length"] for grade in grades] == [9, 9, 1]
    assert {"question_only", "brief"} <= grades[0].rewards.keys()
    as_list = SFTConfig.model_validate({"reward": ["question_only*0.9", "my.py:brief*0.2"]})
    assert grade_responses(responses, ["4"] * 3, as_list.reward_function) == grades
    Path("mine.yaml").write_text("reward: [question_only*0.9, my.py:brief*0.2]\n")
    arguments = ["preset=laptop", "config=mine.yaml"]
    assert load_config(SFTConfig, REPOSITORY / "config.yaml", arguments).reward == as_list.reward
    assert as_list.reward_function.prompt == "question_only"
    assert SFTConfig.model_validate(as_list.model_dump(mode="json")) == as_list


def test_terms_of_a_sum(folder):
    (folder / "c++").mkdir()
    (folder / "c++/my.py").write_text(MY_REWARDS)
    (folder / "a+b.py").write_text(MY_REWARDS)
    for one in ("c++/my.py:half", "a+b.py:half"):
        assert [term.name for term in read_terms(one)] == [one]
    assert [term.name for term in read_terms("my.py:half + r1_zero")] == ["my.py:half", "r1_zero"]
    assert [term.weight for term in read_terms("my.py:half*0.5+r1_zero")] == [0.5, 1]
    assert read_terms("c++/my.py:half*2")[0].weight == 2
    assert [term.weight for term in read_terms("my.py:half*1e-3+my.py:brief*-1")] == [0.001, -1]
    for wrong, message in (
        ("r1_zero*0.5+gone.py:f", "reward = gone.py:f: there is no file"),
        ("r1*2", "reward = r1: "),
    ):
        with pytest.raises(UserError, match=message):
            find_reward(wrong)
    with pytest.raises(UserError, match=r"reward = r1_zero\*1\.2\.3: r1_zero\*1\.2\.3 has no finite weight"):
        find_reward("r1_zero*1.2.3")


def test_every_key_is_logged_of_rollouts_and_of_evaluations():
    """`brief` of "ab" and "abcdef": lengths 2 and 6, so a mean of 4."""
    reward = find_reward("my.py:brief")
    texts = ["ab", "abcdef"]
    grades = grade_responses(texts, ["1", "1"], reward)
    assert own_means([grade.rewards for grade in grades]) == {"length": 4.0}
    responses = [Response([1], text, [5, 6], [], "stop") for text in texts]
    rollouts = make_rollouts([Example("q", "p", "1", None, "s")], responses, grades, None, 2)
    metrics = summarize_rollouts(rollouts, GRPOConfig(group_size=2))
    assert (metrics["reward/length"], metrics["reward/errors"], metrics["rollout/reward"]) == (4.0, 0, 0.5)
    common = {"question": 0, "sample": 0, "response_length": 2, "token_entropy": None, "finish_reason": "stop"}
    rows = [{**common, **grade.rewards} for grade in grades]
    found = summarize_evaluation(rows, grades, 2.0, reward)
    assert (found["reward_length"], found["sampled_tokens_per_second"]) == (4.0, 2.0)


def test_one_failing_response_costs_itself_and_is_counted():
    texts = ["raise", "fine"]
    grades = grade_responses(texts, ["1", "1"], find_reward("my.py:odd"))
    responses = [Response([1], text, [5, 6], [], "stop") for text in texts]
    rollouts = make_rollouts([Example("q", "p", "1", None, "s")], responses, grades, None, 2)
    metrics = summarize_rollouts(rollouts, GRPOConfig(group_size=2))
    assert (metrics["reward/errors"], metrics["rollout/reward"]) == (1, 0.5)  # of 0 and 1


def test_a_batch_in_which_every_response_fails_ends_the_run():
    reward = Reward(lambda response, truth: None)
    with pytest.raises(RewardError, match="returned None"):
        grade_responses(["a"], ["1"], reward)


def test_examples_with_columns_stand_in_sets():
    one, other = (Example("q", "p", "1", None, "s", Fields(level=[level])) for level in (1, 2))
    assert len({one, other, one._replace()}) == 2


def test_the_limit_of_the_configuration_reaches_every_reward():
    assert SFTConfig(reward="my.py:half", max_reward_seconds=3).reward_function.max_seconds == 3
    (_, _, own), _ = SFTConfig(reward="my.py:half + r1_zero", max_reward_seconds=3).reward_function.parts
    assert own.max_seconds == 3


def test_a_sum_asks_for_the_fields_of_its_parts_and_fails_as_a_whole():
    reward = find_reward("my.py:by_level*0.5 + my.py:odd")
    assert reward.wanted[:2] == ({"level", "question", "weight"}, {"level", "question"})
    assert find_reward("my.py:half + my.py:everything").wanted.takes_all
    fine, broken = grade_responses(["4", "none"], ["4"] * 2, reward, [{"level": 3, "question": "q"}] * 2)
    assert fine.rewards["reward"] == 0.5 * 6 + 1
    assert set(broken.rewards.values()) == {0.0} and broken.failure == "error"


def test_few_reasons_are_said(capsys):
    for number in range(9):
        own_rewards.say_once(str(number))
    assert len(capsys.readouterr().err.splitlines()) == own_rewards.MOST_SAID
