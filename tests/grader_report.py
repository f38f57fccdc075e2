"""A report on the grader: what it gets right and wrong on a corpus of pairs, and how fast it is.

    uv run python tests/grader_report.py [pairs.tsv] [--math-verify]

A corpus is a text file with a header and five columns between tabs: category, answer, ground truth, 1 if they are
equal or 0, and the reason. Without an argument it is tests/grading_corpus.tsv. With `--math-verify` one more column
tells how often math-verify, another grader, gives the verdict of the corpus.
"""

import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from plainrl.cli import run_main
from plainrl.devices import run_command, sync_command
from plainrl.grading.rewards import grade_answer
from plainrl.records import UserError

CORPUS = Path(__file__).with_name("grading_corpus.tsv")

# Answers and ground truths, with N for a number. 10 of the 20 are right. 8 are numbers and 12 are short LaTeX, of which
# one is right in another form.
ORDINARY = (
    ("N", "N"), ("N.0", "N"), ("N/7", r"\frac{N}{7}"), ("N.50", "N.5"),
    ("N1", "N"), ("-N", "N"), (r"\frac{7}{N}", r"\frac{N}{7}"), ("0.N", "N"),
    (r"N\sqrt{3}", r"N\sqrt{3}"), (r"\dfrac{N\pi}{4}", r"\frac{N\pi}{4}"), ("x^2 + N", "x^2+N"),
    ("(N, 2)", "(N,2)"), (r"\{N,1\}", r"\{1,N\}"), ("N+x^2", "x^2+N"),
    (r"3\sqrt{N}", r"N\sqrt{3}"), (r"\frac{\pi}{N}", r"\frac{N\pi}{4}"), ("x^2-N", "x^2+N"),
    ("(2,N)", "(N,2)"), ("(1,N)", "[1,N)"), (r"\frac{\sqrt{2}}{N}", r"\frac{\sqrt{N}}{2}"),
)  # fmt: skip
# Right answers that are neither the same text nor the same number
IN_ANOTHER_FORM = (
    ("N+x^2", "x^2+N"), (r"\sqrt{3}\cdot N", r"N\sqrt{3}"), (r"\frac{N}{4}\pi", r"\frac{N\pi}{4}"),
    ("(x+N)(x-1)", "(x-1)(x+N)"),
)  # fmt: skip


class Pair(NamedTuple):
    """One line of a corpus."""

    category: str
    answer: str
    ground_truth: str
    equal: bool
    reason: str


def read_corpus(path: Path) -> list[Pair]:
    """Return the pairs of a corpus.

    Raises:
        UserError: the file cannot be read, or a line does not have five columns with a 0 or 1 in the fourth.
    """
    remedy = "give a file with a header and five columns between tabs: category, answer, ground truth, 1 or 0, reason"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; {remedy}") from None
    pairs = []
    for number, line in enumerate(lines[1:], start=2):
        columns = line.split("\t")
        if len(columns) == 5 and columns[3] in ("0", "1"):
            pairs.append(Pair(columns[0], columns[1], columns[2], columns[3] == "1", columns[4]))
        elif line:
            raise UserError(f"{path}, line {number}: {line[:100]!r}; {remedy}")
    return pairs


def math_verify_accepts(pair: Pair) -> bool:
    """Return whether math-verify takes the answer of a pair for right, both sides in a box and within a second each."""
    from math_verify import parse, verify  # slow, and not needed otherwise

    gold, answer = (parse(rf"\boxed{{{text}}}", parsing_timeout=1) for text in (pair.ground_truth, pair.answer))
    return verify(gold, answer, timeout_seconds=1)


def report(path: Path, with_math_verify: bool = False) -> None:
    """Print for each category of a corpus how often and how fast the grader agrees; then each error and the rates."""
    pairs = read_corpus(path)
    wrong: list[tuple[str, Pair]] = []
    title = "  math-verify agrees" if with_math_verify else ""
    print(f"{'category':<32} pairs  agree  false accepts  false rejects  failures  ms per item{title}")
    for category in dict.fromkeys(pair.category for pair in pairs):
        members = [pair for pair in pairs if pair.category == category]
        started = time.perf_counter()
        grades = [grade_answer(pair.answer, pair.ground_truth) for pair in members]
        milliseconds = 1000 * (time.perf_counter() - started) / len(members)
        accepted = [bool(grade.rewards["answer_reward"]) for grade in grades]
        false = [pair for pair, is_accepted in zip(members, accepted, strict=True) if is_accepted != pair.equal]
        wrong += [("false reject" if pair.equal else "false accept", pair) for pair in false]
        num_accepts = sum(not pair.equal for pair in false)
        num_failures = sum(grade.failure is not None for grade in grades)
        print(
            f"{category:<32} {len(members):>5}  {1 - len(false) / len(members):>5.3f}  {num_accepts:>13}  "
            f"{len(false) - num_accepts:>13}  {num_failures:>8}  {milliseconds:>11.1f}",
            end="" if with_math_verify else "\n",
        )
        if with_math_verify:
            print(f"  {sum(math_verify_accepts(pair) == pair.equal for pair in members) / len(members):>18.3f}")
    for kind, pair in wrong:
        print(f"{kind}: {pair.answer!r} against {pair.ground_truth!r} ({pair.reason})")

    for name, forms in (("ordinary answers", ORDINARY), ("answers in another form", IN_ANOTHER_FORM)):
        num_right, per_second = measure_throughput(forms)
        print(f"{name}: {per_second:,.0f} per second, {num_right:.0%} right; one at a time, none seen before")


def measure_throughput(
    forms: Sequence[tuple[str, str]], numbers: Sequence[int] = range(100, 200)
) -> tuple[float, float]:
    """Measure how many answers are graded per second, one at a time.

    Args:
        forms: pairs of answer and ground truth, with N for a number.
        numbers: each takes the place of N in each form, so that no pair is seen twice.

    Returns:
        The share of right answers, and the answers graded per second.
    """
    pairs = [(answer.replace("N", str(n)), truth.replace("N", str(n))) for n in numbers for answer, truth in forms]
    started = time.perf_counter()
    num_right = sum(grade_answer(answer, truth).rewards["reward"] for answer, truth in pairs)
    return num_right / len(pairs), len(pairs) / (time.perf_counter() - started)


def main(arguments: list[str]) -> None:
    """Grade the corpus that the command line names."""
    paths = [argument for argument in arguments if argument != "--math-verify"]
    if len(paths) > 1 or any(argument.startswith("-") for argument in paths):
        raise UserError(f"usage: {run_command('python tests/grader_report.py')} [pairs.tsv] [--math-verify]")
    with_math_verify = paths != arguments
    if with_math_verify and find_spec("math_verify") is None:
        raise UserError(f"--math-verify: the package math-verify is not installed; run `{sync_command()}`")
    report(Path(paths[0]) if paths else CORPUS, with_math_verify)


if __name__ == "__main__":
    run_main(main)
