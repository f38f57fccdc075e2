"""Records as people have them: plain, boxed, chat, AIME, verl; CSV and gzip; fields by name; splits; several sets."""

import csv
import gzip
import json
import re

import pytest

from plainrl.config import GRPOConfig, SFTConfig
from plainrl.data import by_dataset, load_questions, load_sft_examples, load_validation, validation_subset
from plainrl.layouts import FieldNames, parse_record
from plainrl.records import UserError
from plainrl.sources import read_records

CHAT = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": r"One and one: \boxed{2}"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def small(**settings):
    sizes = {"rollout_batch_size": 8, "train_batch_size": 8, "gradient_accumulation_steps": 1}
    return GRPOConfig(**sizes, **settings)


@pytest.mark.parametrize(
    ("values", "question", "truth", "reasoning", "response"),
    [
        ({"question": "q", "answer": "72"}, "q", "72", None, None),
        ({"question": "q", "answer": "so #### 1,072"}, "q", "1072", "so", None),
        ({"question": "q", "answer": "2", "solution": "s"}, "q", "2", "s", None),
        ({"problem": "q", "solution": r"so \boxed{\frac12}"}, "q", r"\frac12", r"so \boxed{\frac12}", None),
        ({"problem": "q", "solution": "nothing"}, "q", None, "nothing", None),
        ({"ID": "2024-I-1", "Problem": "q", "Solution": "s", "Answer": 204}, "q", "204", "s", None),
        ({"prompt": "q", "ground_truth": 5}, "q", "5", None, None),
        ({"prompt": "q", "completion": "r"}, "q", None, None, "r"),
        ({"question": None, "problem": "q", "answer": "1"}, "q", "1", None, None),
        ({"messages": CHAT}, "1 + 1?", "2", CHAT[1]["content"], None),
        ({"messages": CHAT, "answer": "3"}, "1 + 1?", "3", CHAT[1]["content"], None),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}, "q", None, None, "r"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": "<think>a </think> <answer> 2 </answer>"}]},
         "1 + 1?", None, None, "a </think> <answer> 2 </answer>"),
        ({"prompt": [CHAT[0]], "reward_model": {"style": "rule", "ground_truth": "34"}}, "1 + 1?", "34", None, None),
    ],
)  # fmt: skip
def test_a_record_of_each_layout(values, question, truth, reasoning, response):
    record = parse_record(values, "f, line 1")
    assert (record.question, record.ground_truth) == (question, truth)
    assert (record.reasoning, record.response) == (reasoning, response)
    is_written_out = isinstance(values.get("prompt"), str)
    assert record.prompt == (question if is_written_out else None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": CHAT * 2}, "f, line 3: field messages has 2 questions and 2 answers; only one question"),
        ({"messages": []}, "f, line 3: field messages has 0 questions and 0 answers"),
        ({"messages": ["hi"]}, "f, line 3: field messages holds 'hi'; expected messages with role and content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "expected messages with role and content"),
        ({"messages": [{"role": "user", "content": None}]}, "f, line 3: field messages.content is None; expected text"),
        ({"messages": [CHAT[0]]}, "f, line 3: fields ['messages'] fit no known layout; needed are a question"),
        ({"question": "q"}, "f, line 3: fields ['question'] fit no known layout; needed are a question"),
    ],
)
def test_what_fits_no_layout_is_one_line(values, message):
    with pytest.raises(UserError) as caught:
        parse_record(values, "f, line 3")
    assert message in str(caught.value)


def test_fields_are_named_by_the_user():
    names = FieldNames("ask", "final", "work")
    record = parse_record({"ask": "q", "final": 7, "work": "s", "answer": "other", "problem": "no"}, "f", names)
    assert (record.question, record.ground_truth, record.reasoning) == ("q", "7", "s")
    record = parse_record({"question": "q", "answer": "no", "final": "7"}, "f", FieldNames(answer="final"))
    assert (record.question, record.ground_truth) == ("q", "7")
    whole = parse_record({"question": "q", "t": "a </think> <answer> 2 </answer>"}, "f", FieldNames(trace="t"))
    assert whole.response == "a </think> <answer> 2 </answer>" and whole.reasoning is None
    for name in ("response", "completion"):  # whatever a solution is called
        row = {"question": "q", "answer": "5", name: "2 + 3 = 5"}
        short = parse_record(row, "f", FieldNames(trace=name))
        assert (short.response, short.reasoning) == (None, "2 + 3 = 5")
    gsm8k = {"question": "q", "answer": "48/2 = <<48/2=24>>24.\n#### 24"}
    assert parse_record(gsm8k, "f", FieldNames(trace="answer")) == parse_record(gsm8k, "f")
    with pytest.raises(UserError, match=r"field generations is \['a', 'b'\]; expected text"):
        parse_record({"question": "q", "generations": ["a", "b"]}, "f", FieldNames(trace="generations"))
    with pytest.raises(UserError, match="field completion holds 'a'; expected messages"):
        parse_record({"question": "q", "completion": ["a", "b"]}, "f", FieldNames(trace="completion"))
    chat = [{"role": "assistant", "content": "2 + 3 = \\boxed{5}"}]
    row = {"prompt": [{"role": "user", "content": "q"}], "completion": chat}
    assert parse_record(row, "f", FieldNames(trace="completion")) == parse_record(row, "f")
    tips = [{"role": "user", "content": "Tips?"}, {"role": "assistant", "content": "Intro.\n#### Tips\n- Dark room."}]
    heading = parse_record({"messages": tips}, "f")
    assert (heading.response, heading.ground_truth) == ("Intro.\n#### Tips\n- Dark room.", None)
    tips[1]["content"] = "It is dark.\n#### 7\n"
    assert parse_record({"messages": tips}, "f").ground_truth == "7"
    row = {"question": "q", "solution": ["s"], "final_answer": ["5"]}  # nobody needs this solution
    record = parse_record(row, "f", FieldNames(answer="final_answer"))
    assert (record.ground_truth, record.reasoning) == ("5", None)
    with pytest.raises(UserError, match=r"field solution is \['s'\]; expected text"):
        parse_record(row, "f")
    bare = parse_record({"prompt": "q", "answer": "2"}, "f", FieldNames(question="prompt"))
    assert (bare.question, bare.prompt) == ("q", None)  # the template is filled in
    with pytest.raises(UserError, match=r"^question_field = ask: f has no such field; it has question, answer$"):
        parse_record({"question": "q", "answer": "1"}, "f", names._replace(answer="", trace=""))
    assert parse_record({"question": "q", "answer": "1"}, "f", names, is_strict=False).question == "q"
    held_out = {"ask": "q", "final": "7"}  # whose traces nobody reads
    assert parse_record(held_out, "f", names, is_strict=False).ground_truth == "7"
    with pytest.raises(UserError, match="^trace_field = work: f has no such field"):
        parse_record(held_out, "f", names)


def test_of_fields_that_differ_in_case_the_first_that_is_filled_counts():
    for answer, other in (("5", ""), ("", "5"), ("5", "6")):
        assert parse_record({"problem": "q", "answer": answer, "Answer": other}, "f").ground_truth == "5"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_csv_file_is_read_by_its_content(tmp_path, delimiter, is_compressed):
    rows = [{"problem": 'What is "1"\n+ 1, or; so?', "answer": "2"}, {"problem": "é", "answer": ""}]
    path = tmp_path / "data.txt"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["problem", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    if is_compressed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    read = list(read_records(str(path)))
    assert [values for values, _ in read] == rows
    assert [where for _, where in read] == [f"{path}, line 3", f"{path}, line 4"]  # where each row ends
    assert parse_record(read[1][0], "f").ground_truth is None


def test_tabs_may_begin_with_a_column_without_a_name(tmp_path):
    """So does pandas write its index."""
    path = tmp_path / "data.tsv"
    path.write_text("\n\tquestion\tanswer\n0\tWhat?\t5\n")
    ((values, where),) = read_records(str(path))
    assert (values["question"], values["answer"], where) == ("What?", "5", f"{path}, line 3")


def test_a_small_csv_file_does_not_lower_the_limit_of_all_csv(tmp_path):
    """The limit on a field belongs to the process. Python itself reads the list of installed packages as CSV."""
    limit = csv.field_size_limit()
    path = tmp_path / "data.csv"
    path.write_text("question,answer\n1 + 1,2\n")
    assert len(list(read_records(str(path)))) == 1
    assert csv.field_size_limit() == limit
    path.write_text(f"question,answer\n{'1' * (limit + 1)},2\n")  # one that is longer is read all the same
    assert len(list(read_records(str(path)))) == 1
    csv.field_size_limit(limit)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"problem,answer\n1,2,3\n", "line 2: 3 values, but the first line names 2 columns; put values that hold"),
        (b"problem,answer,answer\n", "line 1: two columns have one name; rename one of problem, answer, answer"),
        (b'problem,answer\n"1,2\n', "line 2: broken CSV (unexpected end of data); fix it"),
        (b"a,b\n1,2\n", "line 2: fields ['a', 'b'] fit no known layout"),
        (b"\x1f\x8bbroken", "is a damaged gzip file"),
        (b"problem,answer\n", "has no records"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_validation(SFTConfig(validation_data=str(path)))
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_compressed_json_lines_and_parquet_are_read(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p")
    for name, content in (("j.gz", json.dumps(rows[0]).encode()), ("p.gz", (tmp_path / "p").read_bytes())):
        (tmp_path / name).write_bytes(gzip.compress(content))
        assert next(iter(read_records(str(tmp_path / name))))[0] == rows[0]


def test_a_solution_with_a_box_becomes_a_trace_with_its_answer(tmp_path):
    data = write(tmp_path / "math.jsonl", [{"problem": "q", "solution": r"So \boxed{5}."}])
    (example,) = load_sft_examples(SFTConfig(train_data=data))
    assert (example.ground_truth, example.response) == ("5", r" So \boxed{5}. </think> <answer> 5 </answer>")


def test_system_messages_are_left_out_and_counted(tmp_path, capsys):
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    data = write(tmp_path / "chat.jsonl", [{"messages": chat}, {"messages": CHAT}])
    examples = load_validation(SFTConfig(validation_data=data)).everything
    assert [example.question for example in examples] == ["1 + 1?"] * 2
    assert f"left out: the system messages of 1 records of {data}" in capsys.readouterr().out


def test_a_fraction_is_held_out_by_a_seed_of_its_own(tmp_path, capsys):
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(50)] * 2
    data = write(tmp_path / "mine.jsonl", [*rows, {"question": "no answer?", "answer": ""}])
    config = small(train_data=data, validation_fraction=0.2)
    validation = load_validation(config)
    held_out = [example.question for example in validation.everything]
    assert len(held_out) == len(set(held_out)) == 10
    assert f"validation: 10 of 50 questions of {data} (validation_fraction = 0.2" in capsys.readouterr().out
    questions = [example.question for example in load_questions(validation.everything, config)]
    assert len(questions) == 80 and not set(held_out) & set(questions)
    again = load_validation(config.model_copy(update={"seed": 7})).everything
    assert [example.question for example in again] == held_out
    other = load_validation(config.model_copy(update={"validation_seed": 1})).everything
    assert {example.question for example in other} != set(held_out)
    write(tmp_path / "mine.jsonl", rows[::-1])  # the questions decide, not their order
    assert {example.question for example in load_validation(config).everything} == set(held_out)
    assert not any("validation_data" in text for text in config.warnings())


def test_several_validation_sets_are_kept_apart_and_all_held_out(tmp_path, capsys):
    """MATH, GSM8K and AIME at once: each keeps its layout, its name and its own subset."""
    math_set = write(tmp_path / "math.jsonl", [{"problem": f"m{n}?", "answer": "1", "level": "1"} for n in range(9)])
    gsm8k = write(tmp_path / "gsm8k.jsonl", [{"question": f"g{n}?", "answer": "so #### 2"} for n in range(7)])
    aime = write(tmp_path / "aime.jsonl", [{"ID": n, "Problem": f"a{n}?", "Answer": 204} for n in range(3)])
    train = write(
        tmp_path / "t.jsonl", [{"problem": f"{kind}{n}?", "answer": "1"} for kind in "mgat" for n in range(9)]
    )
    config = small(
        train_data=train,
        validation_data=math_set,
        extra_validation_data={"gsm8k": gsm8k, "aime": aime},
        num_eval_examples=5,
        num_final_eval_examples=4,
    )
    validation = load_validation(config)
    sizes = [{k: len(v) for k, v in by_dataset(part).items()} for part in validation]
    assert sizes == [{"": 9, "gsm8k": 7, "aime": 3}, {"": 5, "gsm8k": 5, "aime": 3}, {"": 4, "gsm8k": 4, "aime": 3}]
    assert (
        "evaluations ask all 3 validation questions of aime, fewer than num_eval_examples = 5"
        in capsys.readouterr().out
    )
    truths = {
        name: {example.ground_truth for example in of_set} for name, of_set in by_dataset(validation.during).items()
    }
    assert truths == {"": {"1"}, "gsm8k": {"2"}, "aime": {"204"}}
    alone = config.model_copy(update={"extra_validation_data": {}})
    assert validation_subset(load_validation(alone).everything, alone) == by_dataset(validation.during)[""]
    questions = load_questions(validation.everything, small(train_data=train, group_size=8))
    assert sorted(example.question for example in questions) == sorted([f"t{n}?" for n in range(9)] + ["g7?", "g8?"] + [
        f"a{n}?" for n in range(3, 9)
    ])  # fmt: skip


def test_embedded_questions_are_evaluated_by_their_number_of_terms():
    config = small(
        arithmetic_terms=[2, 3],
        arithmetic_max_term=10,
        extra_validation_data={"four": "arithmetic:4", "six": "arithmetic:6"},
        num_eval_examples=20,
        num_final_eval_examples="all",
    )
    sets = by_dataset(load_validation(config).final)
    assert {name: len(examples) for name, examples in sets.items()} == {"": 1024, "four": 1024, "six": 1024}
    terms = {name: {len(re.findall(r"\d+", e.question)) for e in examples} for name, examples in sets.items()}
    assert terms == {"": {2, 3}, "four": {4}, "six": {6}}


def test_a_set_needs_a_name_that_a_metric_can_have():
    with pytest.raises(ValueError, match=r"call 'a/b' by letters, digits, \., _ and -"):
        SFTConfig(extra_validation_data={"a/b": "x.jsonl"})


def test_own_names_of_fields_hold_for_the_training_data_and_where_a_validation_set_has_them(tmp_path):
    train = write(tmp_path / "t.jsonl", [{"ask": f"{n}?", "result": n} for n in range(9)])
    gsm8k = write(tmp_path / "v.jsonl", [{"question": "v?", "answer": "#### 2"}])
    config = small(train_data=train, validation_data=gsm8k, question_field="ask", answer_field="result")
    assert load_validation(config).everything[0].ground_truth == "2"
    assert len(load_questions([], config)) == 9
    with pytest.raises(
        UserError, match=r"^answer_field = wrong: .*t.jsonl, line 1 has no such field; it has ask, result$"
    ):
        load_questions([], config.model_copy(update={"answer_field": "wrong"}))
