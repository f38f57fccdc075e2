"""Every layout is read, every fault named with its place, and the embedded data is worked out rightly."""

import datetime
import decimal
import json
import os
import re
import threading
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from tiny import write_lines

from plainrl.layouts import parse_record
from plainrl.records import UserError
from plainrl.sources import arithmetic_records, embedded_terms, read_records

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
        ({"problem": "p", "answer": True}, "f, line 3: field answer is True; expected text"),
        ({"problem": "p", "answer": {"value": 1}}, "f, line 3: field answer is {'value': 1}; expected text"),
        ({"problem": "p", "answer": ["a", ["b"]]}, "f, line 3: field answer is ['b']; expected text"),
        ({"problem": float("nan"), "answer": "a"}, "f, line 3: field problem is nan; expected text"),
        ({"prompt": "p", "response": float("inf")}, "f, line 3: field response is inf; expected text"),
        ({"problem": "p \ud83d", "answer": "a"}, r"f, line 3: field problem holds the character '\ud83d'"),
        ({"problem": "p", "answer": "\udc00"}, r"f, line 3: field answer holds the character '\udc00'"),
        ({"problem": "p", "answer": "1", "solution": "s\0"}, r"f, line 3: field solution holds the character '\x00'"),
        ({"problem": "", "answer": "a"}, "f, line 3: field problem is ''"),
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
    table = tmp_path / "table.jsonl"
    parquet.write_table(pyarrow.Table.from_pylist(records), table)
    for source in (lines, str(array), str(table)):
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
        ('{"problem": "p", "answer": "1"},\n', "line 1: broken JSON (Extra data)"),
        ('[{"problem": "p"},]', "line 1: broken JSON array (Expecting value); fix record 2"),
        ('[{"problem": "p"}\n\n{"problem": "q"}]', "line 3: broken JSON array (expected , or ] after the record)"),
        ('[{"problem": "p"}]\n[]', "line 2: broken JSON array (text follows the array)"),
        ('[{"problem": "p"}', "line 1: broken JSON array (expected , or ] after the record); fix record 1"),
        ('{"problem": "p", "problem": "q"}\n', "line 1: broken JSON (the key 'problem' stands twice)"),
        (
            '\n[{"a": 1},\n{"x": {"id": 1, "id": 2}}]',
            "line 3: broken JSON array (the key 'id' stands twice); fix record 2",
        ),
        ('{"id": 1' + "0" * 5000 + "}\n", "line 1: broken JSON (Exceeds the limit (4300 digits)"),
        ("[{}, {}, [1" + "0" * 5000 + "]]", "line 1: broken JSON array (Exceeds the limit (4300 digits)"),
        ('\n{"id": -1' + "0" * 5000 + "}\n", "line 2: broken JSON (Exceeds the limit (4300 digits)"),
        ('{"id": ' + "[" * 10**5 + "]" * 10**5 + "}\n", "line 1: broken JSON (it is nested too deeply)"),
        (
            '[{},\n{"id": ' + '{"a":' * 10**5 + "1" + "}" * 10**5 + "}]",
            "line 2: broken JSON array (it is nested too deeply)",
        ),
        ("[" * 10**5, "line 1: broken JSON array (it is nested too deeply); fix record 1"),
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


def test_embedded_questions_may_have_a_number_of_terms_of_their_own():
    default = (2, 3)
    found = [embedded_terms(source, default) for source in ("arithmetic", "arithmetic:5", "arithmetic:2-6", "x.csv")]
    assert found == [(2, 3), (5, 5), (2, 6), None]
    for text in ("", "1", "3-2", "2-", "a", "2-3-4", "-3"):
        with pytest.raises(UserError, match="write arithmetic:TERMS or arithmetic:FEWEST-MOST, with at least 2 terms"):
            embedded_terms(f"arithmetic:{text}", default)


def test_hub_names_may_carry_a_configuration(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return datasets.Dataset.from_list([{"question": "q", "answer": "#### 1", "id": 7.0}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for source in ("openai/gsm8k/main:train", "owner/name:test"):
        ((values, where),) = read_records(source)
        assert values == {"question": "q", "answer": "#### 1", "id": None} and where == f"{source}, row 1"
    assert asked == [("openai/gsm8k", "main", "train"), ("owner/name", "test")]


def test_a_damaged_parquet_file_is_a_user_error(tmp_path):
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="starts like Parquet but cannot be read"):
        list(read_records(str(path)))


def write_bytes(path, content):
    path.write_bytes(content)
    return str(path)


LINES = b'{"problem": "p", "answer": "1"}\n{"problem": "q", "answer": "2"}\n'
TWO = [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": "2"}]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + LINES,
        LINES.replace(b"\n", b"\n\xef\xbb\xbf", 1),  # two files joined
        b"\xef\xbb\xbf \n" + json.dumps(TWO, indent=1).encode(),
        LINES.replace(b"\n", b"\r\n"),
        LINES.replace(b"\n", b"\r"),
        b"\n\n" + LINES.replace(b"\n", b"\n\n  \n") + b"\t",
        json.dumps(TWO).encode() + b"\r\n\n",
    ],
)
def test_marks_and_line_ends_that_are_no_data(tmp_path, content):
    assert [values for values, _ in read_records(write_bytes(tmp_path / "data.jsonl", content))] == TWO


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    records = [{"problem": "a\u2028b\x85c", "answer": "1"}, {"problem": "q", "answer": "2"}]
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    found = list(read_records(write_bytes(tmp_path / "data.jsonl", content)))
    assert [values for values, _ in found] == records and found[1][1].endswith(", line 2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINES.decode().encode("utf-16"), "is UTF-16 or UTF-32 text, or holds NUL bytes; convert"),
        (LINES.decode().encode("utf-16-be"), "is UTF-16 or UTF-32 text, or holds NUL bytes; convert"),
        (LINES.replace(b"q", b"\xe9"), r"is not UTF-8 text \(line 2, byte 45\); convert it"),
        (LINES.replace(b"q", b"\xed\xa0\xbd"), r"is not UTF-8 text \(line 2, byte 45\)"),  # a surrogate, raw
        (LINES + b"\0" * 9, r"line 3: broken JSON \(Expecting value\)"),  # as after a crash
        (LINES.replace(b"q", b"\0"), r"line 2: broken JSON \(Invalid control character at\)"),
    ],
)
def test_bytes_that_are_no_text_name_their_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        list(read_records(write_bytes(tmp_path / "data.jsonl", content)))


def answers(source):
    """The right answer of each record; all of them where there are several."""
    records = [parse_record(values, where) for values, where in read_records(source)]
    return [[r.ground_truth, *r.alternatives] if r.alternatives else r.ground_truth for r in records]


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "null", '" "', "[]", "[NaN, null]"]
)
def test_what_is_no_number_is_no_answer(tmp_path, value):
    layouts = (
        '{"problem": "p", "answer": VALUE}\n',
        '{"problem": "p", "expected_answer": VALUE}\n',
        '{"prompt": "p", "response": "r", "ground_truth": VALUE}\n',
        '{"question": "q", "answer": VALUE}\n',
    )
    lines = [layout.replace("VALUE", value) for layout in layouts]
    assert answers(write_lines(tmp_path / "data.jsonl", lines)) == [None] * 4


def test_numbers_become_their_digits(tmp_path):
    values = ["7", "7.0", "-0.25", "1e22", "1e-7", "12345678901234567890", '["1/2", 0.5]', "[3]"]
    lines = [f'{{"problem": "p", "answer": {value}}}\n' for value in values]
    wanted = ["7", "7", "-0.25", "1" + "0" * 22, "0.0000001", "12345678901234567890", ["1/2", "0.5"], "3"]
    assert answers(write_lines(tmp_path / "data.jsonl", lines)) == wanted


def write_table(path, answers, **columns):
    table = pyarrow.table({"problem": [f"p{i}" for i in range(len(answers))], "answer": answers, **columns})
    parquet.write_table(table, path)
    return str(path)


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        (pyarrow.array([7, None, 8], pyarrow.int64()), ["7", None, "8"]),
        (pyarrow.array([7.0, None, -8.0]), ["7", None, "-8"]),  # as pandas writes integers with one missing
        (pyarrow.array([7.0, float("nan"), 8.0]), ["7", None, "8"]),
        (pyarrow.array([7.0, float("nan"), 0.5]), ["7", None, "0.5"]),
        (pyarrow.array([7.0, 8.0]), ["7", "8"]),
        (pyarrow.array([float("inf"), float("-inf"), float("nan")]), [None, None, None]),
        (pyarrow.array([0.1, 1e22], pyarrow.float32()), ["0.1", "1" + "0" * 22]),
        (pyarrow.array([decimal.Decimal("1.50"), None]), ["1.50", None]),
        (pyarrow.array([["1", "2"], ["3"], [], None]), [["1", "2"], "3", None, None]),
        (pyarrow.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
        (pyarrow.nulls(2), [None, None]),
    ],
)
def test_columns_of_parquet(tmp_path, column, wanted):
    assert answers(write_table(tmp_path / "data.parquet", column)) == wanted


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pyarrow.array([datetime.date(2020, 1, 2)]), "row 1: field answer is datetime.date"),
        (pyarrow.array([True]), "row 1: field answer is True; expected text"),
        (pyarrow.array([{"value": 1}]), "row 1: field answer is {'value': 1}; expected text"),
        (pyarrow.array([b"1"]), "row 1: field answer is b'1'; expected text"),
        (pyarrow.array([b"1", b"\xff"]).cast(pyarrow.binary()).view(pyarrow.string()), "row 2: field answer cannot be"),
        (pyarrow.array([1577836800000000001], pyarrow.timestamp("ns")), "row 1: field answer"),
        (pyarrow.array([2**62], pyarrow.timestamp("us")), "row 1: field answer cannot be read as timestamp"),
    ],
)
def test_columns_of_parquet_that_are_no_text_name_the_row(tmp_path, column, message):
    with pytest.raises(UserError, match=message):
        answers(write_table(tmp_path / "data.parquet", column))


def test_columns_that_no_layout_names_are_not_looked_at(tmp_path):
    never = pyarrow.array([2**62], pyarrow.timestamp("us"))
    source = write_table(tmp_path / "data.parquet", ["1"], made=never, problem_id=[[1]])
    assert answers(source) == ["1"]
    parquet.write_table(pyarrow.table({"made": never}), tmp_path / "data.parquet")
    with pytest.raises(UserError, match=re.escape("row 1: fields ['made'] fit no known layout")):
        answers(source)


def test_a_parquet_file_is_read_as_it_is_now(tmp_path):
    """Also if path, size and time stay the same, by which a cache would know it."""
    path = tmp_path / "data.parquet"
    found = []
    for answer in ("1", "2", "3"):
        write_table(path, [answer])
        os.utime(path, (10**9, 10**9))
        found.append((answers(str(path)), path.stat().st_size))
    assert [wanted for wanted, _ in found] == [["1"], ["2"], ["3"]]
    assert len({size for _, size in found}) == 1


def test_parquet_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "data.parquet"
    write_table(path, [str(i) for i in range(1000)])
    whole = path.read_bytes()
    renamed = whole.replace(b"answer", b"\xffnswer")
    for torn in (whole[:-1], whole[: len(whole) // 2], whole[:4] + whole[-300:], b"PAR1", renamed):
        path.write_bytes(torn)
        with pytest.raises(UserError, match="starts like Parquet but cannot be read"):
            answers(str(path))
    columns = [pyarrow.array(["p"]), pyarrow.array(["1"]), pyarrow.array(["2"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["problem", "answer", "answer"]), path)
    with pytest.raises(UserError, match="has several columns answer; leave one"):
        answers(str(path))


def through_pipe(content):
    """Return the path of a pipe that holds this, as `<(cat file)` does."""
    reading, writing = os.pipe()

    def write():
        with os.fdopen(writing, "wb") as file:
            file.write(content)

    threading.Thread(target=write, daemon=True).start()
    return f"/dev/fd/{reading}"


def test_a_pipe_loses_nothing(tmp_path):
    records = [{"problem": f"p{i} " + "x" * 300, "answer": str(i)} for i in range(400)]
    lines = Path(write_lines(tmp_path / "lines", records)).read_bytes()
    table = tmp_path / "table"
    parquet.write_table(pyarrow.Table.from_pylist(records), table)
    for content in (lines, json.dumps(records).encode(), table.read_bytes()):
        assert len(content) > 4096
        assert [values for values, _ in read_records(through_pipe(content))] == records
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    threading.Thread(target=fifo.write_bytes, args=(lines,), daemon=True).start()
    assert [values for values, _ in read_records(str(fifo))] == records


def test_a_device_is_no_data():
    for device in ("/dev/null", "/dev/zero"):
        with pytest.raises(UserError, match=f"{device} is a device; name a file or a pipe"):
            list(read_records(device))
