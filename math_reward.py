r"""Reward functions: does a response keep the format, and does its answer equal the ground truth?

    r1_zero        format 1 exactly if "</think> <answer>" and "</answer>" both occur; the answer is what
                   follows the last <answer>, a \boxed{} inside it unwrapped
    question_only  format 1 exactly if there is a \boxed{}; the answer is what the last one holds

In both, answer_reward = reward = 1 where format is 1 and the answer equals the ground truth mathematically
(math_equality.py). An answer that cannot be compared within its limits of time and memory is graded 0, with the reason.

As a script: `uv run python math_reward.py --report [pairs.tsv]` grades a corpus of pairs and prints what it got wrong.
"""

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, cast

from math_equality import answers_match
from math_worker import NUM_WORKERS, GradingError
from run_config import UserError, run_main

RewardFunction = Callable[[str, str], dict[str, float]]


class Grade(NamedTuple):
    """The rewards of a response, and why it could not be compared where that was so: timeout, memory or error."""

    rewards: dict[str, float]
    failure: str | None = None


def r1_zero_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    """Grade a response in the format of the r1_zero prompt.

    >>> r1_zero_reward_fn("1 + 1 = 2 </think> <answer> 2 </answer>", "2")
    {'format_reward': 1.0, 'answer_reward': 1.0, 'reward': 1.0}
    >>> r1_zero_reward_fn("2", "2")
    {'format_reward': 0.0, 'answer_reward': 0.0, 'reward': 0.0}
    """
    return grade_answer(extract_r1_zero(response), ground_truth).rewards


def question_only_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    r"""Grade a response whose answer stands in its last `\boxed{}`.

    >>> question_only_reward_fn(r"So it is \boxed{\frac{1}{2}}.", "0.5")["reward"]
    1.0
    """
    return grade_answer(last_boxed(response), ground_truth).rewards


def grade_responses(
    responses: Sequence[str], ground_truths: Sequence[str], reward_fn: str | RewardFunction
) -> list[Grade]:
    """Grade a batch, several at a time; never raises for what a response holds.

    Args:
        responses: N responses.
        ground_truths: N answers.
        reward_fn: `r1_zero`, `question_only`, or a function of your own (called one by one, its errors are its own).

    Returns:
        N grades, in the order given. Time is bounded by N x SECONDS_PER_ITEM / NUM_WORKERS, and the import of sympy
        (1 to 2 seconds) when an answer first needs it.
    """
    pairs = list(zip(responses, ground_truths, strict=True))
    if isinstance(reward_fn, str) and reward_fn not in REWARD_FUNCTIONS:
        raise ValueError(f"reward_fn = {reward_fn!r}: use {', '.join(REWARD_FUNCTIONS)}, or a function")
    with ThreadPoolExecutor(NUM_WORKERS if reward_fn in EXTRACTORS else 1) as threads:
        return list(threads.map(lambda pair: grade_response(pair[0], pair[1], reward_fn), pairs))


def grade_response(response: str, ground_truth: str, reward_fn: str | RewardFunction) -> Grade:
    """Grade one response, as `grade_responses` does: for callers with threads of their own."""
    if reward_fn in EXTRACTORS:
        return grade_answer(EXTRACTORS[reward_fn](response), ground_truth)
    return Grade(cast(RewardFunction, reward_fn)(response, ground_truth))


def count_failures(failures: Sequence[str | None]) -> dict[str, int]:
    """Return how many answers could not be compared, by reason."""
    return {
        "timeouts": failures.count("timeout"),
        "out_of_memory": failures.count("memory"),
        "errors": failures.count("error"),
    }


def grade_answer(answer: str | None, ground_truth: str) -> Grade:
    """Grade an extracted answer; None means that the response does not keep the format."""
    if answer is None:
        return Grade(dict.fromkeys(("format_reward", "answer_reward", "reward"), 0.0))
    try:
        correct, failure = float(answers_match(answer, ground_truth)), None
    except GradingError as error:
        correct, failure = 0.0, str(error)
    return Grade({"format_reward": 1.0, "answer_reward": correct, "reward": correct}, failure)


def extract_r1_zero(response: str) -> str | None:
    r"""Return what follows the last <answer>, a `\boxed{}` in it unwrapped; None if the format is not kept."""
    if "</think> <answer>" not in response or "</answer>" not in response:
        return None
    answer = response.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    boxed = last_boxed(answer)
    return answer if boxed is None else boxed


def last_boxed(text: str) -> str | None:
    r"""Return what the last complete `\boxed{...}` holds, nested braces included, or None.

    >>> last_boxed(r"\boxed{1} then \boxed{\frac{2}{3}}")
    '\\frac{2}{3}'
    """
    openings: list[int | None] = []  # for each open brace where its box begins, None if it is another brace
    last = None
    for match in re.finditer(r"\\(?:boxed|fbox)\s{0,20}\{|\\[{}]|[{}]", text):
        token = match[0]
        if token[0] == "\\" and token[-1] == "{" and len(token) > 2:
            openings.append(match.end())
        elif token == "{":
            openings.append(None)
        elif token == "}" and openings:
            start = openings.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, match.start()
    return None if last is None else text[last[0] : last[1]].strip()


REWARD_FUNCTIONS: dict[str, RewardFunction] = {
    "r1_zero": r1_zero_reward_fn,
    "question_only": question_only_reward_fn,
}
EXTRACTORS: dict[str | RewardFunction, Callable[[str], str | None]] = {
    "r1_zero": extract_r1_zero,
    r1_zero_reward_fn: extract_r1_zero,
    "question_only": last_boxed,
    question_only_reward_fn: last_boxed,
}


class Pair(NamedTuple):
    """One line of a corpus."""

    category: str
    answer: str
    ground_truth: str
    equal: bool
    reason: str


def read_corpus(path: Path) -> list[Pair]:
    """Return the pairs of a corpus: tab-separated category, answer, ground truth, equal (0 or 1), reason."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [line.split("\t") for line in lines[1:] if line]
        return [Pair(category, answer, truth, equal == "1", reason) for category, answer, truth, equal, reason in rows]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: {error}; give a file with a header and five columns between tabs: category, answer, ground "
            "truth, 1 (equal) or 0, reason"
        ) from None


def report(path: Path) -> None:
    """Print agreement, false accepts, false rejects and time per item for each category of a corpus; and throughput."""
    pairs = read_corpus(path)
    wrong: list[tuple[str, Pair]] = []
    print(f"{'category':<32} pairs  agree  false accepts  false rejects  failures  ms per item")
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
            f"{len(false) - num_accepts:>13}  {num_failures:>8}  {milliseconds:>11.1f}"
        )
    for kind, pair in wrong:
        print(f"{kind}: {pair.answer!r} against {pair.ground_truth!r} ({pair.reason})")

    for name, forms in (("ordinary answers", ORDINARY), ("answers that only sympy accepts", IN_ANOTHER_FORM)):
        num_right, per_second = measure_throughput(forms)
        print(f"{name}: {per_second:,.0f} per second, {num_right:.0%} right; one at a time, none seen before")


def measure_throughput(
    forms: Sequence[tuple[str, str]], numbers: Sequence[int] = range(100, 200)
) -> tuple[float, float]:
    """Return the share of right answers and the number graded per second, for each number put for N into each form."""
    pairs = [(answer.replace("N", str(n)), truth.replace("N", str(n))) for n in numbers for answer, truth in forms]
    answers_match("x+1", "1+x")  # the workers are there
    started = time.perf_counter()
    num_right = sum(grade_answer(answer, truth).rewards["reward"] for answer, truth in pairs)
    return num_right / len(pairs), len(pairs) / (time.perf_counter() - started)


# Answers and ground truths. Of 20, 10 are right; 8 are numbers, 12 short LaTeX, of which 1 is right in another form
ORDINARY = (
    ("N", "N"), ("N.0", "N"), ("N/7", r"\frac{N}{7}"), ("N.50", "N.5"),
    ("N1", "N"), ("-N", "N"), (r"\frac{7}{N}", r"\frac{N}{7}"), ("0.N", "N"),
    (r"N\sqrt{3}", r"N\sqrt{3}"), (r"\dfrac{N\pi}{4}", r"\frac{N\pi}{4}"), ("x^2 + N", "x^2+N"),
    ("(N, 2)", "(N,2)"), (r"\{N,1\}", r"\{1,N\}"), ("N+x^2", "x^2+N"),
    (r"3\sqrt{N}", r"N\sqrt{3}"), (r"\frac{\pi}{N}", r"\frac{N\pi}{4}"), ("x^2-N", "x^2+N"),
    ("(2,N)", "(N,2)"), ("(1,N)", "[1,N)"), (r"\frac{\sqrt{2}}{N}", r"\frac{\sqrt{N}}{2}"),
)  # fmt: skip
IN_ANOTHER_FORM = (
    ("N+x^2", "x^2+N"), (r"\sqrt{3}\cdot N", r"N\sqrt{3}"), (r"\frac{N}{4}\pi", r"\frac{N\pi}{4}"),
    ("(x+N)(x-1)", "(x-1)(x+N)"),
)  # fmt: skip


def main(arguments: list[str]) -> None:
    """Grade a corpus."""
    if arguments[:1] != ["--report"]:
        raise UserError("usage: uv run python math_reward.py --report [pairs.tsv]")
    report(Path(arguments[1]) if len(arguments) > 1 else Path(__file__).parent / "tests" / "grading_corpus.tsv")


if __name__ == "__main__":
    run_main(main)
