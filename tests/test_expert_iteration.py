"""Expert iteration: real runs with a real engine; what is kept, what is trained on, nothing kept, resumed."""

import json
import os
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_GRPO_train import documented_metrics
from tiny import expert_iteration_arguments, read_lines, train_rows

from experiments import expert_iteration
from experiments.expert_iteration import choose_correct, fine_tune
from plainrl.config import ExpertIterationConfig
from plainrl.data import load_questions
from plainrl.grading.rewards import grade_responses, r1_zero_reward_fn
from plainrl.records import Example, Response, UserError
from plainrl.rollouts import make_rollouts


def without_measurements(rows):
    """Without seconds, tokens per second and memory, which no two runs share."""
    measured = re.compile(r"(time|memory)/|.*/(seconds|sampled_tokens_per_second)$")
    return [{name: value for name, value in row.items() if not measured.match(name)} for row in rows]


def questions_file(folder, answers):
    """Sums whose answer is one digit, as the tiny answering model guesses it; `answers` makes the ground truths."""
    path = folder / "questions.jsonl"
    rows = [{"problem": f"What is {a} + {b}?", "answer": answers(a + b)} for a in range(1, 6) for b in range(1, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def real_engine(engine, monkeypatch):
    """The scripts' own evaluator, with the engine that all tests share in place of a new one."""
    monkeypatch.setattr("policy_evaluation.init_vllm", lambda *_, **__: engine)


@pytest.fixture
def record(monkeypatch):
    """What was sampled in each step, and the batches trained on in each, as they passed."""
    sampled, batches = [], []
    original_sample, original_train = expert_iteration.sample_groups, expert_iteration.accumulate_gradients

    def sample_groups(llm, questions, prompt_ids, chosen, step, config, threads):
        result = original_sample(llm, questions, prompt_ids, chosen, step, config, threads)
        asked = [questions[index] for index in chosen for _ in range(config.group_size)]
        sampled.append(list(zip(asked, result[0], strict=True)))
        batches.append([])
        return result

    def accumulate_gradients(policy, batch, *arguments):
        batches[-1].append(batch)
        return original_train(policy, batch, *arguments)

    monkeypatch.setattr(expert_iteration, "sample_groups", sample_groups)
    monkeypatch.setattr(expert_iteration, "accumulate_gradients", accumulate_gradients)
    return sampled, batches


def test_a_run_trains_on_the_correct_distinct_responses_as_they_were_sampled(
    answering_model_folder, tmp_path, real_engine, record
):
    data = questions_file(tmp_path, str)
    arguments = expert_iteration_arguments(answering_model_folder, tmp_path, run_name="a", train_data=data)
    expert_iteration.main(arguments)
    sampled, batches = record
    rows = train_rows(tmp_path / "a")
    num_correct, num_updates = 0, 0
    for step, (responses, step_batches) in enumerate(zip(sampled, batches, strict=True), start=1):
        assert len(responses) == 8 * 16
        correct = [
            (question.question, tuple(response.prompt_ids), tuple(response.token_ids))
            for question, response in responses
            if r1_zero_reward_fn(response.text, question.ground_truth)["reward"] == 1
        ]
        trained = Counter(
            (row.example.question, tuple(row.prompt_ids), tuple(row.response_ids))
            for batch in step_batches
            for row in batch
        )
        assert trained == dict.fromkeys(correct, 2)  # two passes over each distinct one
        assert len(set(correct)) >= 2
        num_correct += len(correct)
        num_updates += len(step_batches)
        last = [row for row in rows if row["ei_step"] == step][-1]
        assert last["train_step"] == num_updates
        assert last["rollout/num_kept"] == len(set(correct))
        assert last["rollout/num_questions_with_correct"] == len({question for question, *_ in correct})
        assert last["rollout/reward"] == pytest.approx(len(correct) / 128)
        assert last["rollout/zero_advantage_fraction"] == pytest.approx(1 - len(set(correct)) / 128)
    assert num_correct > sum(row.get("rollout/num_kept", 0) for row in rows)  # there was something to merge
    assert [row["train_step"] for row in rows] == list(range(1, num_updates + 1))

    documented = documented_metrics("EI") - {"train/rank_efficiency"}  # of several ranks
    everything = read_lines(tmp_path / "a/metrics.jsonl")
    assert {name for row in everything for name in row} == documented
    documented = {name for name in documented if not name.startswith("eval")}
    for_each_update = {name for name in documented if name.startswith("train/")}
    for row, following in zip(rows, [*rows[1:], {"ei_step": 0}], strict=True):
        is_last = row["ei_step"] != following["ei_step"]
        assert set(row) == (documented if is_last else {"train_step", "ei_step"} | for_each_update)
        assert all(row[name] is not None for name in for_each_update)
    files = {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*")}
    assert {"final/config.json", "training.png", "samples/rollouts_000002.jsonl", "samples/eval_000001.jsonl"} <= files
    assert "samples/eval_all_000002.jsonl" in files


def test_a_step_that_keeps_nothing_is_said_and_passed_over(answering_model_folder, tmp_path, real_engine, capsys):
    data = questions_file(tmp_path, lambda total: str(100 + total))  # two tokens too many for the model's guesses
    arguments = expert_iteration_arguments(answering_model_folder, tmp_path, run_name="a", train_data=data)
    expert_iteration.main(arguments)
    output = capsys.readouterr().out
    assert [f"step {step}: none of 128 responses is correct" in output for step in (1, 2, 3)] == [True, True, False]
    rows = train_rows(tmp_path / "a")
    assert [(row["train_step"], row["ei_step"], row["rollout/num_kept"]) for row in rows] == [(0, 1, 0), (0, 2, 0)]
    assert not any(name.startswith("train/") for row in rows for name in row)
    weights = [Path(folder) / "model.safetensors" for folder in (answering_model_folder, tmp_path / "a" / "final")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_stopped_and_resumed_run_is_the_run_that_would_have_been(
    answering_model_folder, tmp_path, real_engine, monkeypatch
):
    data = questions_file(tmp_path, str)
    common = {"train_data": data, "n_ei_steps": 3}
    expert_iteration.main(expert_iteration_arguments(answering_model_folder, tmp_path, run_name="straight", **common))

    original, calls = expert_iteration.choose_correct, []

    def with_ctrl_c(*arguments):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(expert_iteration, "choose_correct", with_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        expert_iteration.main(
            expert_iteration_arguments(answering_model_folder, tmp_path, run_name="stopped", **common)
        )
    monkeypatch.setattr(expert_iteration, "choose_correct", original)
    assert max(row.get("ei_step", 0) for row in read_lines(tmp_path / "stopped/metrics.jsonl")) == 2
    expert_iteration.main([f"resume={tmp_path / 'stopped'}"])

    straight, stopped = (tmp_path / name for name in ("straight", "stopped"))
    assert read_lines(straight / "metrics.jsonl")[-1]["eval_all/seconds"] > 0
    assert without_measurements(read_lines(stopped / "metrics.jsonl")) == without_measurements(
        read_lines(straight / "metrics.jsonl")
    )
    assert (stopped / "final/model.safetensors").read_bytes() == (straight / "final/model.safetensors").read_bytes()


def config_of(**overrides):
    values = {"group_size": 4, "train_batch_size": 2, "gradient_accumulation_steps": 1, "compute_dtype": "float32"}
    return ExpertIterationConfig(**(values | overrides))


def make_group(config):
    """Two questions, four responses each: right, the same again, right in other tokens, wrong; then right last."""
    questions = [Example("q1", "p1", "1", None, "s"), Example("q2", "p2", "2", None, "s")]
    sampled = [(1, [17, 18]), (1, [17, 18]), (1, [17, 19]), (5, [17, 20]), (5, [1]), (5, [2]), (5, [3]), (2, [4, 5])]
    responses = [
        Response([5, 6], f"</think> <answer> {answer} </answer>", ids, [0.0] * len(ids), "stop")
        for answer, ids in sampled
    ]
    grades = grade_responses([response.text for response in responses], ["1"] * 4 + ["2"] * 4, "r1_zero")
    return questions, responses, grades, config


def kept_and_left(config):
    """The rollouts of that group, with an advantage of 1 where they are kept, as `train` makes them."""
    questions, responses, grades, _ = make_group(config)
    is_kept = choose_correct(questions, responses, grades, config)
    return make_rollouts(questions, responses, grades, [float(kept) for kept in is_kept], config.group_size)


@pytest.mark.parametrize(("keep", "kept"), [("distinct", [0, 2, 7]), ("one", [0, 7])])
def test_what_is_kept_of_each_question(keep, kept):
    rollouts = kept_and_left(config_of(keep_correct=keep))
    assert [index for index, rollout in enumerate(rollouts) if rollout.advantage == 1] == kept
    assert [rollout.advantage for rollout in rollouts].count(0) == 8 - len(kept)
    assert [rollout.example.question for rollout in rollouts] == ["q1"] * 4 + ["q2"] * 4


def test_what_is_correct_is_the_answer_whatever_reward_it_gets():
    """A reward of the user's own may be worth more than 1, or less: docs/how_to.md has one that counts the level."""
    questions, responses, grades, config = make_group(config_of())
    weighed = [grade._replace(rewards=grade.rewards | {"reward": 3 * grade.rewards["reward"]}) for grade in grades]
    assert choose_correct(questions, responses, weighed, config) == choose_correct(questions, responses, grades, config)


def test_a_question_that_comes_twice_counts_as_one():
    (question, _), responses, grades, config = make_group(config_of())
    is_kept = choose_correct([question, question], responses[:4] * 2, grades[:4] * 2, config)
    assert [index for index, kept in enumerate(is_kept) if kept] == [0, 2]


def test_the_sampled_ids_are_trained_on_and_a_pass_ends_with_a_smaller_batch(tiny_model, tokenizer, monkeypatch):
    """The ids are none that the text would be tokenized to; three rows in batches of two, two passes."""
    batches, original = [], expert_iteration.accumulate_gradients

    def accumulate_gradients(policy, batch, *arguments):
        batches.append([row.response_ids for row in batch])
        return original(policy, batch, *arguments)

    monkeypatch.setattr(expert_iteration, "accumulate_gradients", accumulate_gradients)
    kept = [rollout for rollout in kept_and_left(config_of()) if rollout.advantage]
    assert all(tokenizer.encode(rollout.response.text) != rollout.response.token_ids for rollout in kept)
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-2)
    rows = fine_tune(tiny_model, optimizer, kept, 0, 1, config_of(ei_epochs=2))
    assert [len(batch) for batch in batches] == [2, 1, 2, 1]
    for pass_over in (batches[:2], batches[2:]):
        assert sorted(ids for batch in pass_over for ids in batch) == [[4, 5], [17, 18], [17, 19]]
    assert [row["train/num_response_tokens"] for row in rows] == [4, 2, 4, 2]
    assert sum(row["train/loss_per_token"] for row in rows[2:]) < sum(row["train/loss_per_token"] for row in rows[:2])


def test_a_loss_that_is_nan_leaves_the_policy_alone(tiny_model, monkeypatch):
    original = expert_iteration.accumulate_gradients
    monkeypatch.setattr(
        expert_iteration, "accumulate_gradients", lambda *arguments: original(*arguments) | {"train/loss": float("nan")}
    )
    before = [parameter.detach().clone() for parameter in tiny_model.parameters()]
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-3)
    kept = [rollout for rollout in kept_and_left(config_of()) if rollout.advantage]
    with pytest.raises(UserError, match="step 7: loss nan"):
        fine_tune(tiny_model, optimizer, kept, 0, 7, config_of())
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_model.parameters(), strict=True))


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="sampling_temperature = 0 samples the same response"):
        config_of(sampling_temperature=0)
    data = questions_file(tmp_path, str)
    with pytest.raises(UserError, match="has 20 questions, but a step takes 21; let it take 20 or fewer"):
        load_questions([], config_of(train_data=str(data), ei_batch_size=21))
