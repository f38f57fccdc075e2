"""The report on the grader: what it prints, what it refuses, and that it runs as a script."""

import subprocess
import sys
from pathlib import Path

import grader_report
import pytest

from plainrl.devices import run_command
from plainrl.records import UserError

REPOSITORY = Path(__file__).parent.parent
HEADER = "category\tanswer\tground_truth\tequal\treason\n"


def write_pairs(folder, *lines):
    path = folder / "pairs.tsv"
    path.write_text(HEADER + "".join(f"{line}\n" for line in lines))
    return path


def test_the_report_names_what_the_grader_got_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grader_report, "measure_throughput", lambda forms: (1.0, 1234.0))
    lines = ("a\t1\t1.0\t1\tsame", "b\t1\t1\t0\tnot so", "b\t1\t2\t1\talike", "b\t1\t2\t0\tother", "a\t3\t3\t1\tsame")
    grader_report.main([str(write_pairs(tmp_path, *lines))])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:3] == ["category", "pairs", "agree"]
    # category, pairs, agreement, false accepts, false rejects, failures
    assert printed[1].split()[:6] == ["a", "2", "1.000", "0", "0", "0"]
    assert printed[2].split()[:6] == ["b", "3", "0.333", "1", "1", "0"]
    assert printed[3] == "false accept: '1' against '1' (not so)"
    assert printed[4] == "false reject: '1' against '2' (alike)"
    assert printed[5].startswith("ordinary answers: 1,234 per second, 100% right")
    assert len(printed) == 7


def test_a_corpus_holds_backslashes_and_spaces_as_they_are(tmp_path):
    path = write_pairs(tmp_path, "a\t \\\\frac12 \t\\frac{1}{2}\t1\twhy", "", "b\t1, 2\t1\t0\twhy not")
    assert grader_report.read_corpus(path) == [
        ("a", " \\\\frac12 ", "\\frac{1}{2}", True, "why"),
        ("b", "1, 2", "1", False, "why not"),
    ]


def test_throughput_is_measured_on_pairs_of_which_none_is_seen_twice(monkeypatch):
    graded = []
    grade_answer = grader_report.grade_answer
    monkeypatch.setattr(grader_report, "grade_answer", lambda *pair: graded.append(pair) or grade_answer(*pair))
    num_right, per_second = grader_report.measure_throughput([("N.0", "N"), ("N1", "N")], [7, 8])
    assert graded == [("7.0", "7"), ("71", "7"), ("8.0", "8"), ("81", "8")]
    assert num_right == 0.5
    assert per_second > 0
    for forms in (grader_report.ORDINARY, grader_report.IN_ANOTHER_FORM):
        assert all("N" in answer + truth for answer, truth in forms)


def test_ordinary_answers_are_half_right():
    assert grader_report.measure_throughput(grader_report.ORDINARY, [101])[0] == 0.5
    assert grader_report.measure_throughput(grader_report.IN_ANOTHER_FORM, [101])[0] == 1


@pytest.mark.parametrize("line", ["one\ttwo", "a\t1\t2\t1\twhy\tand more", "a\t1\t2\tyes\twhy", "a\t1\t2\t\twhy"])
def test_a_line_that_is_no_pair_is_named(tmp_path, line):
    with pytest.raises(UserError, match=r"pairs.tsv, line 3: .*; give a file with a header and five columns"):
        grader_report.main([str(write_pairs(tmp_path, "a\t1\t1\t1\tsame", line))])


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    damaged = tmp_path / "pairs.tsv"
    damaged.write_bytes(b"header\n\xff\t1\t1\t1\tno UTF-8\n")
    for path in (damaged, tmp_path / "missing.tsv", tmp_path):
        with pytest.raises(UserError, match=r"; give a file with a header and five columns between tabs: category"):
            grader_report.main([str(path)])


# Pairs on which math-verify, the library of this name, is right; the last two are those on which it is not
PEER_PAIRS = [
    ("5", "5", 1), ("6", "5", 0), ("0.5", r"\frac{1}{2}", 1), (r"\frac{2}{1}", r"\frac{1}{2}", 0),
    (r"\sqrt{8}", r"2\sqrt{2}", 1), (r"\sqrt{2}", "2", 0), ("x+1", "1+x", 1), ("x-1", "1+x", 0),
    ("(1,2)", "(1,2)", 1), ("(2,1)", "(1,2)", 0), (r"\{1,2\}", r"\{2,1\}", 1), (r"\{1,3\}", r"\{1,2\}", 0),
    (r"\pi", r"\pi", 1), (r"2\pi", r"\pi", 0), ("-7", "-7", 1), ("7", "-7", 0), ("2^{3}", "8", 1), ("2^{3}", "6", 0),
    ("0.333333", r"\frac{1}{3}", 0), (r"\ln 2\cdot 3", r"\ln 6", 0),
]  # fmt: skip


def test_the_report_compares_with_math_verify_if_asked(tmp_path, monkeypatch, capsys):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(grader_report, "measure_throughput", lambda forms: (1.0, 1.0))
    pairs = [("right" if number < 18 else "wrong", *pair) for number, pair in enumerate(PEER_PAIRS)]
    path = write_pairs(tmp_path, *("\t".join([*map(str, pair), "why"]) for pair in pairs))
    grader_report.main([str(path), "--math-verify"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("  math-verify agrees")
    assert [line.split()[:3] for line in lines[1:]][:2] == [["right", "18", "1.000"], ["wrong", "2", "1.000"]]
    assert [line.split()[-1] for line in lines[1:3]] == ["1.000", "0.000"]


def test_a_comparison_needs_math_verify(monkeypatch):
    monkeypatch.setattr(grader_report, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--math-verify: the package math-verify is not installed; run `uv sync.*`$"):
        grader_report.main(["--math-verify"])


@pytest.mark.parametrize("arguments", [["--report"], ["one.tsv", "other.tsv"]])
def test_other_arguments_are_refused(arguments):
    with pytest.raises(
        UserError, match=rf"^usage: {run_command('python tests/grader_report.py')} \[pairs.tsv\] \[--math-verify\]$"
    ):
        grader_report.main(arguments)


def run_script(folder, *arguments):
    command = [sys.executable, str(REPOSITORY / "tests" / "grader_report.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_the_report_runs_as_a_script_from_any_folder(tmp_path):
    path = write_pairs(tmp_path, "alike\t\\frac12\t0.5\t1\tthe same value", "alike\t1\t2\t0\tanother value")
    result = run_script(tmp_path, str(path))
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[1].split()[:6] == ["alike", "2", "1.000", "0", "0", "0"]
    assert [line.partition(":")[0] for line in lines[2:]] == ["ordinary answers", "answers in another form"]


def test_a_mistake_ends_in_one_line(tmp_path):
    result = run_script(tmp_path, "missing.tsv")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: missing.tsv: ")
    assert result.stderr.count("\n") == 1
