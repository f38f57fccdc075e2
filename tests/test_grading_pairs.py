"""Unequal pairs made from right answers: which damages there are, and that the grader accepts none of them."""

import json
import random

import grader_report
import grading_pairs
import pytest
from grading_pairs import DAMAGES, make_unequal_pairs

from plainrl.grading.rewards import grade_answer
from plainrl.records import UserError

TRUTHS = [pair.ground_truth for pair in grader_report.read_corpus(grader_report.CORPUS)]


@pytest.mark.parametrize(
    ("name", "answer", "damaged"),
    [
        ("digit", "7", set("12345689")),
        ("digit", "x", {None}),
        ("digit", r"\frac13 \approx 0.33", {None}),
        ("sign", "5", {"-5"}),
        ("sign", "-5", {"5"}),
        ("sign", "0", {None}),
        ("sign", "-0", {None}),
        ("sign within", "x + 1", {"x - 1"}),
        ("order", "(1, 2, 3)", {"(2, 3, 1)"}),
        ("order", "(2,2)", {None}),
        ("fraction", r"2\frac{1}{3}", {r"2\frac{3}{1}"}),
        ("unit", r"5\text{ cm}^2", {rf"5\text{{ {unit}}}^2" for unit in grading_pairs.UNITS[1:]}),
        ("point", "20", {"200", "20000", "0.20", "20.20", "200\\%"}),
        ("point", r"20\%", {r"0.20\%"}),
        ("rounded", r"\frac{1}{3}", {"0.33", "0.333"}),
        ("rounded", r"\frac{1}{8}", {"0.12", None}),
        ("rounded", r"2\pi", {"6.28"}),
        ("item", "1, 2", {"1", "1, 2, 9999", "12"}),
        ("item", "1,234", {None}),
        ("bracket", "(1,2)", {"(1,2]"}),
        ("relation", r"x \le 3", {r"x \ge  3", "x < 3"}),
        ("letter", "2x", {"2k", "2m", "2p", "2q"}),
        ("letter", r"x \in [0,1]", {None}),
        ("function", r"\cos x", {r"\tan x"}),
        ("symbol", r"2\pi", {"23"}),
        ("exponent", "x^2", {"x^1", "x^{12}"}),
    ],
)
def test_what_a_damage_does(name, answer, damaged):
    generator = random.Random(0)
    assert {DAMAGES[name](answer, generator) for _ in range(200)} == damaged


def test_the_same_seed_gives_the_same_pairs():
    pairs = make_unequal_pairs(TRUTHS, 200, seed=1)
    assert pairs == make_unequal_pairs(TRUTHS, 200, seed=1)
    assert pairs != make_unequal_pairs(TRUTHS, 200, seed=2)
    assert len({(wrong, right) for _, wrong, right in pairs}) == 200


def test_fewer_pairs_where_the_answers_give_fewer():
    pairs = make_unequal_pairs(["x", "", " "], 50, seed=0)
    assert sorted(pairs) == [("letter", letter, "x") for letter in "kmpq"]
    assert make_unequal_pairs([], 5, seed=0) == []


def test_the_grader_accepts_no_unequal_pair():
    pairs = make_unequal_pairs(TRUTHS, 2000, seed=0)
    assert len(pairs) == 2000
    assert {name for name, _, _ in pairs} == {*DAMAGES, "same shape"}
    assert [pair for pair in pairs if grade_answer(*pair[1:]).rewards["reward"]] == []


def test_the_pairs_of_a_file_are_graded(tmp_path, capsys, monkeypatch):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(f"{json.dumps({'answer': answer})}\n" for answer in ("3", "5", "(1,2)")))
    grading_pairs.main([str(path), "--pairs", "20"])
    assert capsys.readouterr().out.startswith("20 unequal pairs, 0 accepted, ")
    monkeypatch.setattr(grading_pairs, "make_unequal_pairs", lambda *arguments: [("digit", "5", "5.0")])
    grading_pairs.main([str(path)])
    assert capsys.readouterr().out.startswith("accepted: '5' against '5.0' (digit)\n1 unequal pairs, 1 accepted, ")


@pytest.mark.parametrize("content", [b"[1]\n", b"{}\n", b"not JSON\n", b"\xff\n"])
def test_a_file_without_answers_is_refused(tmp_path, content):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    for wrong in (path, tmp_path / "missing.jsonl"):
        with pytest.raises(UserError, match=r"jsonl: .*; give a file of JSON records with the key answer"):
            grading_pairs.main([str(wrong)])
