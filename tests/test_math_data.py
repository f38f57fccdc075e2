"""Every layout is read, every fault named with its place, and the embedded data is worked out rightly."""

import json
import re

import pytest

from math_data import (
    arithmetic_records,
    epoch_order,
    fill_prompt,
    final_validation_subset,
    hold_out,
    keep_answered,
    load_examples,
    load_prompt_template,
    load_sft_examples,
    load_validation_set,
    parse_record,
    read_records,
    validation_subset,
)
from math_reward import REWARD_FUNCTIONS, r1_zero_reward_fn
from run_config import SFTConfig, UserError
from SFT_train import select_examples

SFT_TRACE = {
    "problem": "p",
    "reasoning_trace": "r </think> <answer> 1 </answer>",
    "extracted_answer": "1",
    "expected_answer": "2",
}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_layouts():
    record = parse_record(SFT_TRACE, "f, line 1")
    assert (record.question, record.response, record.ground_truth) == ("p", SFT_TRACE["reasoning_trace"], "2")
    record = parse_record({"problem": "p", "expected_answer": "2"}, "f")
    assert (record.question, record.response, record.reasoning, record.ground_truth) == ("p", None, None, "2")
    record = parse_record({"problem": "p", "answer": "2", "level": 1, "subject": "Algebra", "solution": "s"}, "f")
    assert (record.question, record.reasoning, record.ground_truth) == ("p", "s", "2")
    record = parse_record({"prompt": "whole prompt", "response": "r", "ground_truth": "2"}, "f")
    assert (record.prompt, record.response, record.ground_truth) == ("whole prompt", "r", "2")
    record = parse_record({"prompt": "whole prompt", "response": "r"}, "f")
    assert record.ground_truth is None
    record = parse_record({"question": "q", "answer": "He has 2*600=<<2*600=1200>>1200.\nSo.\n#### 1,200"}, "f")
    assert (record.question, record.reasoning, record.ground_truth) == ("q", "He has 2*600=1200. So.", "1200")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "x"}, "f, line 3: fields ['text'] fit no known layout"),
        ({"problem": "p", "answer": ["a"]}, "f, line 3: field answer is ['a']"),
        ({"problem": "", "answer": "a"}, "f, line 3: field problem is ''"),
        ({"question": "q", "answer": "72"}, "f, line 3: answer has no '#### <number>'"),
    ],
)
def test_bad_records_name_their_place(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_record(values, "f, line 3")


def test_files_are_told_apart_by_content(tmp_path):
    records = [{"problem": f"p{i}", "answer": str(i)} for i in range(3)]
    lines = write_lines(tmp_path / "lines.json", records)
    array = tmp_path / "array.jsonl"
    array.write_text(json.dumps(records, indent=1))
    import datasets

    parquet = tmp_path / "table.jsonl"
    datasets.Dataset.from_list(records).to_parquet(str(parquet))
    for source in (lines, str(array), str(parquet)):
        assert [values for values, _ in read_records(source)] == records
    assert [where for _, where in read_records(lines)] == [f"{lines}, line {i}" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ('{"problem": "p", "answer": "1"}\n{"problem": \n', "line 2: broken JSON"),
        ('[{"problem": "p"},\n nonsense]', "line 2: broken JSON array"),
        ("[1]", "record 1: expected an object"),
        ("3\n", "line 1: expected an object"),
    ],
)
def test_broken_files_name_the_line(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        list(read_records(str(path)))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        list(read_records(str(tmp_path / "nothing.jsonl")))
    with pytest.raises(UserError, match="is a folder"):
        list(read_records(str(tmp_path)))


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


def test_arithmetic_is_deterministic_disjoint_and_right():
    train = arithmetic_records("train", (2, 4), 20)
    validation = arithmetic_records("validation", (2, 4), 20)
    assert train == arithmetic_records("train", (2, 4), 20)
    assert (len(train), len(validation)) == (8192, 1024)
    train_questions, validation_questions = ({record.question for record in records} for records in (train, validation))
    assert len(train_questions) == 8192
    small = [{record.question for record in arithmetic_records(split, (2, 3), 10)} for split in ("train", "validation")]
    assert [len(questions) for questions in small] == [3154, 1024]
    assert not small[0] & small[1]
    assert not train_questions & validation_questions
    for record in train[:500] + validation[:500]:
        expression = re.fullmatch(r"What is ([-+ \d]+)\?", record.question)[1]
        assert eval(expression) == int(record.ground_truth)
        for step in record.reasoning.rstrip(".").split(". "):
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert step.endswith(f" = {record.ground_truth}")


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


def test_hub_names_may_carry_a_configuration(monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return [{"question": "q", "answer": "#### 1"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for source in ("openai/gsm8k/main:train", "owner/name:test"):
        assert len(list(read_records(source))) == 1
    assert asked == [("openai/gsm8k", "main", "train"), ("owner/name", "test")]


def test_a_damaged_parquet_file_is_a_user_error(tmp_path):
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="starts like Parquet but cannot be read"):
        list(read_records(str(path)))


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
