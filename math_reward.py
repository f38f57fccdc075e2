r"""Reward functions: does a response keep the format, and does its answer equal the ground truth?

    r1_zero        format 1 exactly if "</think> <answer>" and "</answer>" both occur; the answer is what
                   follows the last <answer>, a \boxed{} inside it unwrapped
    question_only  format 1 exactly if there is a \boxed{}; the answer is what the last one holds

In both, answer_reward = reward = 1 where format is 1 and the answer equals the ground truth
mathematically. Equality: the same text, else the same number, else math-verify's verdict.
"""

import re
import threading
from collections.abc import Callable
from fractions import Fraction

RewardFunction = Callable[[str, str], dict[str, float]]

# Longer answers are compared as text only: no answer of MATH comes near, and parsing time grows with length.
MAX_SYMBOLIC_CHARS = 1000
SYMBOLIC_TIMEOUT_SECONDS = 5


def r1_zero_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    """Grade a response in the format of the r1_zero prompt.

    >>> r1_zero_reward_fn("1 + 1 = 2 </think> <answer> 2 </answer>", "2")
    {'format_reward': 1.0, 'answer_reward': 1.0, 'reward': 1.0}
    >>> r1_zero_reward_fn("2", "2")
    {'format_reward': 0.0, 'answer_reward': 0.0, 'reward': 0.0}
    """
    if "</think> <answer>" not in response or "</answer>" not in response:
        return _rewards(has_format=False, is_correct=False)
    answer = response.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    if "\\boxed" in answer:
        boxed = last_boxed(answer)
        answer = answer if boxed is None else boxed
    return _rewards(has_format=True, is_correct=answers_match(answer, ground_truth))


def question_only_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    r"""Grade a response whose answer stands in its last `\boxed{}`.

    >>> question_only_reward_fn(r"So it is \boxed{\frac{1}{2}}.", "0.5")["reward"]
    1.0
    """
    answer = last_boxed(response)
    if answer is None:
        return _rewards(has_format=False, is_correct=False)
    return _rewards(has_format=True, is_correct=answers_match(answer, ground_truth))


REWARD_FUNCTIONS: dict[str, RewardFunction] = {
    "r1_zero": r1_zero_reward_fn,
    "question_only": question_only_reward_fn,
}


def last_boxed(text: str) -> str | None:
    r"""Return what the last complete `\boxed{...}` holds, nested braces included, or None.

    >>> last_boxed(r"\boxed{1} then \boxed{\frac{2}{3}}")
    '\\frac{2}{3}'
    """
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for position in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start:position].strip()
    return None


def answers_match(answer: str, ground_truth: str) -> bool:
    r"""Return whether an answer equals the ground truth mathematically.

    >>> answers_match("1,234", "1234"), answers_match(r"\frac12", "0.5"), answers_match("2", "3")
    (True, True, False)
    """
    answer, ground_truth = _tidy(answer), _tidy(ground_truth)
    if not answer:
        return False
    if answer == ground_truth:
        return True
    value, true_value = _as_number(answer), _as_number(ground_truth)
    if value is not None and true_value is not None:
        return value == true_value
    return _symbolically_equal(answer, ground_truth)


def _rewards(has_format: bool, is_correct: bool) -> dict[str, float]:
    correct = float(has_format and is_correct)
    return {"format_reward": float(has_format), "answer_reward": correct, "reward": correct}


def _tidy(text: str) -> str:
    """Remove what carries no meaning: dollar signs, spacing commands, spaces that do not part two words or numbers."""
    text = text.strip().strip("$").strip()
    text = re.sub(r"\\(left|right)(?![A-Za-z])|\\!", "", text).replace("\\%", "%").replace("\\$", "")
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text).removesuffix(".")
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", re.sub(r"\s+", " ", text)).strip()


def _as_number(text: str) -> Fraction | None:
    """Return the exact value of an integer, decimal, fraction, mixed number or percentage; None for anything else."""
    text = text.removeprefix("$").replace("{,}", ",")
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?%?", text):
        text = text.replace(",", "")
    if match := re.fullmatch(r"([+-]?)\\frac\{([+-]?\d{1,50})\}\{(\d{1,50})\}", text):
        text = f"{match[1]}{match[2]}/{match[3]}" if not (match[1] and match[2][0] in "+-") else text
    if match := re.fullmatch(r"([+-]?)(\d{1,50}) (\d{1,50}/0*[1-9]\d{0,49})", text):
        value = int(match[2]) + Fraction(match[3])
        return -value if match[1] == "-" else value
    if re.fullmatch(r"[+-]?\d{1,50}/0*[1-9]\d{0,49}", text):
        return Fraction(text)
    if re.fullmatch(r"[+-]?(\d{1,50}\.?\d{0,50}|\.\d{1,50})%?", text):
        value = Fraction(text.removesuffix("%"))
        return value / 100 if text.endswith("%") else value
    return None


def _symbolically_equal(answer: str, ground_truth: str) -> bool:
    if max(len(answer), len(ground_truth)) > MAX_SYMBOLIC_CHARS:
        return False
    # A parser would read two numbers with a space between them as one, or as a product.
    if any(re.search(r"(?<!frac )(?<!\d)\d+ \d", text) for text in (answer, ground_truth)):
        return False
    import math_verify

    # math-verify's time limit is a SIGALRM, which only the main thread may set.
    limit = SYMBOLIC_TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else 0  # 0: none
    truth = math_verify.parse(f"${ground_truth}$", parsing_timeout=limit)
    given = math_verify.parse(f"${answer}$", parsing_timeout=limit)
    return bool(math_verify.verify(truth, given, timeout_seconds=limit))
