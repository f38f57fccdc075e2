"""Every layout is read, every fault named with its place, and the embedded data is worked out rightly."""

import json
import re

import pytest
from tiny import write_lines

from plainrl.records import UserError
from plainrl.sources import arithmetic_records, parse_record, read_records

SFT_TRACE = {
    "problem": "p",
    "reasoning_trace": "r </think> <answer> 1 </answer>",
    "extracted_answer": "1",
    "expected_answer": "2",
}


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
