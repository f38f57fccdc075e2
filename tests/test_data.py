"""Examples: prompts to the letter, traces that are accepted or corrupted, splits that share nothing, fixed orders."""

import re

import pytest
from test_sources import SFT_TRACE
from tiny import write_lines

from plainrl.config import SFTConfig
from plainrl.data import (
    epoch_order,
    fill_prompt,
    final_validation_subset,
    hold_out,
    keep_answered,
    load_examples,
    load_prompt_template,
    load_sft_examples,
    load_validation_set,
    validation_subset,
)
from plainrl.grading.rewards import REWARD_FUNCTIONS, r1_zero_reward_fn
from plainrl.records import UserError
from plainrl.sources import parse_record
from SFT_train import select_examples


def test_prompt_templates_are_to_the_letter():
    template = load_prompt_template("r1_zero")
    assert template.endswith("User: {question}\nAssistant: <think>")
    assert template.count("\n") == 2
    assert load_prompt_template("question_only") == "{question}"
    assert fill_prompt(template, r"\frac{1}{2} {question}").count(r"\frac{1}{2} {question}") == 1


def test_prompt_by_path_needs_its_place_holder(tmp_path):
    path = tmp_path / "my.prompt"
    path.write_text("Q: {question}")
    assert load_prompt_template(str(path)) == "Q: {question}"
    path.write_text("Q:")
    with pytest.raises(UserError, match="place holder"):
        load_prompt_template(str(path))
    with pytest.raises(UserError, match="use question_only, r1_zero"):
        load_prompt_template("r2")


def test_every_embedded_trace_is_accepted_by_its_reward_function():
    for example in load_examples("arithmetic", SFTConfig(), "train")[:300]:
        assert r1_zero_reward_fn(example.response, example.ground_truth)["reward"] == 1


@pytest.mark.parametrize("reward", ["r1_zero", "question_only"])
def test_corrupted_traces_are_the_stated_share_and_those_that_the_reward_function_rejects(reward):
    right, some, more = (
        load_sft_examples(SFTConfig(prompt=reward, reward=reward, arithmetic_corrupt_fraction=share))
        for share in (0.0, 0.25, 0.5)
    )
    changed = [example != clean for example, clean in zip(some, right, strict=True)]
    assert abs(sum(changed) / len(changed) - 0.25) < 3 * (0.25 * 0.75 / len(changed)) ** 0.5
    for example, clean, is_changed in list(zip(some, right, changed, strict=True))[:400]:
        assert example._replace(response=clean.response) == clean  # the ground truth stays right
        grade = REWARD_FUNCTIONS[reward](example.response, example.ground_truth)
        assert (grade["format_reward"], grade["reward"]) == (1, 0 if is_changed else 1)
        if is_changed:
            *steps, last = re.findall(r"(-?\d+ [+-] \d+) = (-?\d+)\.", example.response)
            assert all(eval(left) == int(result) for left, result in steps) and eval(last[0]) != int(last[1])
            assert last[1] in example.response.partition(f" = {last[1]}.")[2]  # the answer is the wrong sum's
    assert all(example == kept for example, kept, is_changed in zip(more, some, changed, strict=True) if is_changed)


def test_validation_data_and_questions_of_rl_are_never_corrupted():
    config = SFTConfig(arithmetic_corrupt_fraction=1.0)
    assert load_validation_set(config) == load_validation_set(SFTConfig())
    assert load_examples("arithmetic", config, "train") == load_examples("arithmetic", SFTConfig(), "train")


def test_filter_correct_takes_the_corrupted_traces_out(capsys):
    config = SFTConfig(arithmetic_corrupt_fraction=0.3, filter_correct=True)
    right = set(load_sft_examples(SFTConfig()))
    kept = select_examples(load_sft_examples(config)[:300], config)
    assert 150 < len(kept) < 270 and set(kept) <= right
    assert (
        "arithmetic_corrupt_fraction has no effect"
        in SFTConfig(arithmetic_corrupt_fraction=0.3, train_data="x.jsonl").warnings()[-1]
    )


def test_validation_subset_ignores_the_run_seed():
    whole = load_validation_set(SFTConfig())
    subsets = [validation_subset(whole, SFTConfig(seed=seed, num_eval_examples=64)) for seed in (0, 1)]
    assert subsets[0] == subsets[1]
    assert len({example.prompt for example in subsets[0]}) == 64
    assert len(validation_subset(whole, SFTConfig(num_eval_examples="all"))) == len(whole) == 1024


def test_the_final_subset_is_fixed_and_a_smaller_set_is_used_whole():
    whole = load_validation_set(SFTConfig())
    subsets = [final_validation_subset(whole, SFTConfig(seed=seed, num_final_eval_examples=64)) for seed in (0, 1)]
    assert subsets[0] == subsets[1]
    assert len({example.prompt for example in subsets[0]}) == 64
    assert final_validation_subset(whole[:63], SFTConfig(num_final_eval_examples=64)) == whole[:63]
    assert final_validation_subset(whole, SFTConfig()) == whole


def test_sft_examples_are_unique_and_follow_the_seed(tmp_path):
    source = write_lines(tmp_path / "sft.jsonl", [SFT_TRACE | {"problem": f"p{i % 6}"} for i in range(12)])
    unique = load_sft_examples(SFTConfig(train_data=source))
    assert [example.question for example in unique] == [f"p{i}" for i in range(6)]
    drawn = select_examples(unique, SFTConfig(train_data=source))
    assert sorted(drawn) == sorted(unique)
    assert select_examples(unique, SFTConfig(train_data=source, num_sft_examples=4)) == drawn[:4]
    assert select_examples(unique, SFTConfig(train_data=source, seed=1)) != drawn
    assert select_examples(unique, SFTConfig(train_data=source, seed=1, examples_seed=0)) == drawn
    with pytest.raises(UserError, match="num_sft_examples = 7: .* has 6 unique"):
        select_examples(unique, SFTConfig(train_data=source, num_sft_examples=7))


def test_questions_of_the_validation_set_are_never_trained_on(tmp_path, capsys):
    source = write_lines(tmp_path / "sft.jsonl", [SFT_TRACE | {"problem": f"p{i}"} for i in range(4)])
    config = SFTConfig(train_data=source)
    examples = load_sft_examples(config)
    assert hold_out(examples, examples[1:3], config) == [examples[0], examples[3]]
    assert "left out: 2 of 4 training examples" in capsys.readouterr().out
    assert hold_out(examples, [], config) == examples
    with pytest.raises(UserError, match="train_data = .*: 4 of 4 training examples have their question in"):
        hold_out(examples, examples, config)


def test_data_without_traces_or_answers_is_refused(tmp_path):
    questions = write_lines(tmp_path / "questions.jsonl", [{"problem": "p", "expected_answer": "1"}])
    with pytest.raises(UserError, match="1 of 1 training examples have no response"):
        load_sft_examples(SFTConfig(train_data=questions))
    traces = write_lines(tmp_path / "traces.jsonl", [{"prompt": "p", "response": "r"}])
    with pytest.raises(UserError, match="questions have no answer, the first at .*traces.jsonl, line 1"):
        load_validation_set(SFTConfig(validation_data=traces))
    with pytest.raises(UserError, match="num_eval_examples = 9: .* has 0 questions"):
        validation_subset([], SFTConfig(validation_data=questions, num_eval_examples=9))


def test_questions_without_an_answer_are_left_out_and_counted(tmp_path, capsys):
    """MATH's own training file has two such records; validation data may have none."""
    records = [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": ""}, {"problem": "r", "answer": None}]
    config = SFTConfig(train_data=write_lines(tmp_path / "train.jsonl", records))
    assert [
        example.question for example in keep_answered(load_examples(config.train_data, config, "train"), config)
    ] == ["p"]
    assert "left out: 2 of 3 training examples have no answer, the first at" in capsys.readouterr().out
    with pytest.raises(UserError, match="line 1: field problem is ''"):
        parse_record({"problem": "", "answer": "1"}, "f, line 1")


def test_epochs_cover_every_example_before_repeating():
    order = epoch_order(num_examples=5, num_draws=13, seed=3)
    assert len(order) == 13
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:10]
    assert order == epoch_order(5, 13, seed=3) != epoch_order(5, 13, seed=4)
