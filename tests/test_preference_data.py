"""Preference pairs: conversations of one turn, what is malformed, held-out instructions, the arithmetic."""

import codecs
import gzip
import json
import re

import pytest
from tiny import REPOSITORY, write_lines

from plainrl.cli import load_config
from plainrl.config import SFTConfig
from plainrl.data import load_sft_examples, load_validation_set
from plainrl.grading.rewards import REWARD_FUNCTIONS, grade_responses
from plainrl.records import UserError
from plainrl.supplement_config import DPOConfig
from supplement.preference_data import Pair, load_pairs, main, read_pairs, tokenize_pairs


def config_of(*arguments):
    return load_config(DPOConfig, REPOSITORY / "supplement/dpo_train.yaml", ["preset=laptop", *arguments])


def conversation(*messages):
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[index % 2]}: {message}" for index, message in enumerate(messages))


def hh(human, chosen, rejected):
    return {"chosen": conversation(human, chosen), "rejected": conversation(human, rejected)}


def test_a_folder_of_gzipped_conversations(tmp_path, capsys):
    """As HH comes: each pair knows its file and line. What is left out is counted and named."""
    lines = [
        hh("Hello", "Hi!", "Go away."),
        {"chosen": conversation("a", "b", "c", "d"), "rejected": conversation("a", "b", "c", "e")},
        {"chosen": conversation("a", "b"), "rejected": conversation("other", "b")},
        hh("Twice", "the same", "the same"),
        {"chosen": "no conversation", "rejected": conversation("a", "b")},
        {"chosen": conversation("a", "b")},
        {"chosen": 3, "rejected": 4},
        hh("Empty", " ", "b"),
        "{broken\n",
        "[1, 2]\n",
        hh("Two\nlines: {braces}", "Yes\n\nindeed.", "No"),
    ]
    write_lines(tmp_path / "plain.jsonl", lines)
    packed = tmp_path / "helpful-base.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "plain.jsonl").read_bytes()))
    (tmp_path / "plain.jsonl").unlink()
    write_lines(tmp_path / "harmless-base.jsonl", [hh("Third", "x", "y")])
    pairs = read_pairs(str(tmp_path))
    assert pairs == [
        Pair("Third", "x", "y", f"{tmp_path}/harmless-base.jsonl, line 1"),
        Pair("Hello", "Hi!", "Go away.", f"{packed}, line 1"),
        Pair("Two\nlines: {braces}", "Yes\n\nindeed.", "No", f"{packed}, line 11"),
    ]
    malformed, several, equal = sorted(capsys.readouterr().out.splitlines(), key=lambda line: "malformed" not in line)
    several, equal = sorted((several, equal), key=lambda line: "several" not in line)
    assert malformed.startswith(f"left out: 7 of 12 records of {tmp_path} are malformed: {packed}, line 3 (the two ")
    assert (
        malformed.endswith("; and 2 more") and "line 5 (no message" in malformed and "line 6 (rejected is" in malformed
    )
    assert several.endswith(f"are conversations of several turns: {packed}, line 2")
    assert equal.endswith(f"1 of 12 records of {tmp_path} are pairs of equal responses: {packed}, line 4")


def test_hidden_files_and_a_byte_order_mark_are_no_data(tmp_path):
    """As a Mac, git and Windows leave them."""
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\1Bud1")
    path = tmp_path / "pairs.json"
    path.write_bytes(codecs.BOM_UTF8 + json.dumps([hh("Hi", "yes", "no")], indent=1).encode())
    (pair,) = read_pairs(str(tmp_path))
    assert pair[:3] == ("Hi", "yes", "no") and pair[3].startswith(str(path))


def test_lines_that_no_tokenizer_takes_are_malformed_and_the_others_read(tmp_path, capsys):
    good = json.dumps({"prompt": "Add.", "chosen": "3", "rejected": "4"}).encode()
    half, doubled = good.replace(b"Add.", b"\\ud800"), good.replace(b'"rejected"', b'"chosen"')
    no_utf8, listed = good.replace(b"Add.", b"\xff"), good.replace(b'"Add."', b"[1]")
    lines = [good, half, no_utf8, doubled, listed, b"\xef\xbb\xbf" + good]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert [pair.source for pair in read_pairs(str(path))] == [f"{path}, line 1", f"{path}, line 6"]
    printed = capsys.readouterr().out
    assert "left out: 4 of 6 records" in printed
    reasons = (
        "line 2 (it holds",
        "line 3 (it holds",
        "line 4 (broken JSON: the key 'chosen' stands twice",
        "line 5 (pr",
    )
    assert all(reason in printed for reason in reasons), printed


def test_a_validation_instruction_is_held_out_however_it_is_spaced(tmp_path):
    rows = [
        {"prompt": f"{'Add' if index % 2 else ' Add '} {index // 2}.", "chosen": "3", "rejected": "4"}
        for index in range(20)
    ]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    config = config_of(f"train_data={path}", "num_pairs=all", "num_validation_pairs=5")
    train, validation = load_pairs([], config)
    asked = [{" ".join(pair.instruction.split()) for pair in pairs} for pairs in (train, validation)]
    assert len(validation) == 5 and train and not asked[0] & asked[1]


def test_pairs_with_a_prompt_of_their_own(tmp_path):
    record = {"prompt": "Add 1 and 2.", "chosen": "3", "rejected": "4"}
    expected = [("Add 1 and 2.", "3", "4")]
    lines = read_pairs(write_lines(tmp_path / "pairs.jsonl", [record]))
    (tmp_path / "pairs.json").write_text(json.dumps([record]))
    array = read_pairs(str(tmp_path / "pairs.json"))
    assert [pair[:3] for pair in lines] == [pair[:3] for pair in array] == expected
    assert array[0].source == f"{tmp_path}/pairs.json, record 1"


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({name: [value] for name, value in hh("Hello", "Hi!", "No.").items()})
    parquet.write_table(table, tmp_path / "pairs.parquet")
    assert [pair[:3] for pair in read_pairs(str(tmp_path / "pairs.parquet"))] == [("Hello", "Hi!", "No.")]


def test_data_without_a_pair_are_an_error(tmp_path):
    path = write_lines(tmp_path / "none.jsonl", [{"question": "q", "answer": "1"}])
    with pytest.raises(UserError, match="none of its 1 records is a preference pair of one turn"):
        read_pairs(path)
    with pytest.raises(UserError, match="does not exist"):
        read_pairs(str(tmp_path / "missing.jsonl"))


def test_an_instruction_is_trained_on_or_held_out_but_not_both(tmp_path):
    """Also where it comes with several pairs of responses."""
    records = [
        {"prompt": f"Question {index % 20}", "chosen": f"right {index}", "rejected": "wrong"} for index in range(60)
    ]
    config = config_of(
        f"train_data={write_lines(tmp_path / 'pairs.jsonl', records)}", "num_validation_pairs=8", "num_pairs=all"
    )
    train, held_out = load_pairs([], config)
    assert len(held_out) == 8
    assert {pair.instruction for pair in train} | {pair.instruction for pair in held_out} == {
        f"Question {index}" for index in range(20)
    }
    assert not {pair.instruction for pair in train} & {pair.instruction for pair in held_out}
    assert load_pairs([], config.model_copy(update={"seed": 1}))[1] == held_out  # the run's seed does not decide
    assert load_pairs([], config) == (train, held_out)
    assert load_pairs([], config.model_copy(update={"seed": 1}))[0] != train


def test_questions_that_are_sampled_are_not_trained_on(tmp_path):
    pairs = [{"prompt": f"Question {index}", "chosen": "right", "rejected": "wrong"} for index in range(10)]
    questions = [{"problem": f"Question {index}", "expected_answer": "1"} for index in range(4)]
    config = config_of(
        f"train_data={write_lines(tmp_path / 'pairs.jsonl', pairs)}",
        f"validation_data={write_lines(tmp_path / 'questions.jsonl', questions)}",
        "num_validation_pairs=1",
        "num_pairs=all",
    )
    train, _ = load_pairs(load_validation_set(config), config)
    assert not {pair.instruction for pair in train} & {f"Question {index}" for index in range(4)}
    assert len(train) in (5, 6)


def test_the_arithmetic_prefers_right_traces_to_wrong_ones():
    config = config_of()
    train, held_out = load_pairs(load_validation_set(config), config)
    assert (len(train), len(held_out)) == (192, 64)
    assert not {pair.instruction for pair in train} & {pair.instruction for pair in held_out}
    truths = [str(eval(pair.instruction.removeprefix("What is ").removesuffix("?"))) for pair in held_out]
    reward = REWARD_FUNCTIONS["r1_zero"]
    for responses, right in ([p.chosen for p in held_out], 1), ([p.rejected for p in held_out], 0):
        grades = [grade.rewards for grade in grade_responses(responses, truths, reward)]
        assert {(grade["format_reward"], grade["answer_reward"]) for grade in grades} == {(1, right)}


def test_the_source_may_give_the_number_of_terms():
    train, held_out = load_pairs([], config_of("train_data=arithmetic:5", "num_pairs=8"))
    assert {len(re.findall(r"[0-9]+", pair.instruction)) for pair in train + held_out} == {5}


def test_too_few_pairs_are_said(tmp_path):
    records = [{"prompt": f"Question {index}", "chosen": "right", "rejected": "wrong"} for index in range(4)]
    path = write_lines(tmp_path / "pairs.jsonl", records)
    for arguments, message in (
        (["num_validation_pairs=4"], "num_validation_pairs = 4: .* has 4 pairs; ask for fewer"),
        (["num_validation_pairs=1", "num_pairs=9"], "num_pairs = 9: 3 pairs can be trained on; ask for fewer, or all"),
    ):
        with pytest.raises(UserError, match=message):
            load_pairs([], config_of(f"train_data={path}", *arguments))


@pytest.mark.parametrize("held_out", [{"validation_fraction": 0.1}, {"extra_validation_data": {"more": "arithmetic"}}])
def test_questions_that_would_not_be_asked_are_refused(held_out):
    with pytest.raises(ValueError, match=f"{next(iter(held_out))} = .*: it has no effect without validation_data"):
        DPOConfig(validation_data="", **held_out)
    with pytest.raises(ValueError, match="validation_fraction = 0.1: pairs hold no questions with answers"):
        DPOConfig(train_data="pairs.jsonl", validation_fraction=0.1)


def test_tokens_of_a_pair(tokenizer):
    """The prompt is in the template, and a response ends in EOS unless it ends in the stop string."""
    pair = Pair("Say {this}.", "Yes", "No </answer>", "s")
    (row,) = tokenize_pairs([pair], tokenizer, config_of("prompt=alpaca"))
    prompt, chosen, rejected = (tokenizer.decode(ids) for ids in row[1:])
    assert prompt.endswith("### Instruction:\nSay {this}.\n\n### Response:\n")
    assert (chosen, rejected) == ("Yes<eos>", "No </answer>")
    (row,) = tokenize_pairs([pair], tokenizer, config_of("prompt=alpaca", "stop_string="))
    assert tokenizer.decode(row.rejected_ids) == "No </answer><eos>"


def test_long_pairs_are_an_error_or_left_out(tokenizer, capsys):
    pairs = [Pair("Short", "a", "b", "first"), Pair("Long", "a", "b " * 400, "second")]
    with pytest.raises(UserError, match="1 of 2 preference pairs exceed max_context_tokens = 256, .* at second"):
        tokenize_pairs(pairs, tokenizer, config_of("max_context_tokens=256"))
    kept = tokenize_pairs(pairs, tokenizer, config_of("max_context_tokens=256", "drop_long_examples=true"))
    assert [row.pair.source for row in kept] == ["first"]
    assert "left out: 1 of 2 preference pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings", [[], ["prompt=alpaca", "train_data=FILE", "num_pairs=1", "num_validation_pairs=1"]]
)
def test_pairs_are_written_for_dpo_and_their_chosen_responses_for_sft(settings, tmp_path, capsys):
    rows = [{"prompt": f"Say {n}", "chosen": f"{n}, with pleasure.", "rejected": "No."} for n in range(3)]
    source, path = write_lines(tmp_path / "source.jsonl", rows), tmp_path / "new/pairs.jsonl"
    settings = [text.replace("FILE", source) for text in settings]
    main([str(path), "preset=laptop", *settings])
    pairs, _ = load_pairs(load_validation_set(config_of(*settings)), config_of(*settings))
    assert [pair._replace(source="") for pair in read_pairs(str(path))] == [pair._replace(source="") for pair in pairs]
    prompt = "alpaca" if settings else "r1_zero"
    examples = load_sft_examples(SFTConfig(train_data=str(path), prompt=prompt, num_eval_examples=1))
    assert {(one.question, one.response) for one in examples} == {(pair.instruction, pair.chosen) for pair in pairs}
    for wrong, message in ((str(path), "is there already"), ("--help", "name of a new file"), ("a=b", "new file")):
        with pytest.raises(UserError, match=message):
            main([wrong])
    capsys.readouterr()
