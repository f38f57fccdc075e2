"""Read an answer out of free text: the letter of a multiple-choice answer, and the last number.

What cannot be read is None, which counts as wrong and is counted apart. A text that names two letters, or a letter that
may be the article "A", is not guessed at.

Source: Stanford CS336 (Spring 2025), supplement of Assignment 5, sections 2.1 and 2.2.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

MARKUP = re.compile(r"[*_`\"“”$]+|\\[()\[\]]")  # **B**, `B`, "B", $B$, \(B\)
QUOTED = re.compile(r"['\u2018]([A-D])['\u2019]|\\(?:text|math)(?:bf|rm|it)?\{\(?([A-D])\)?\}")  # 'B', \text{B}
# One letter as an answer: B, (B), B), [B], \boxed{B}. A small letter counts only where a clause ends behind it.
LETTER = r"(?:\\boxed\{|[(\[])?\s*(?:([A-D])(?![\w'\u2019+-])|([a-d])(?=\s*(?:[.,;:!)\]}]|$)))[)\]}]?"
# Behind these words "A" is the letter: "A because ...", "A, which ...". Before another small word it is the article.
AFTER_ARTICLE = re.compile(r"\s+(?!(?:because|since|as|for|which|or|and|is)\b)[a-z]")
MAYBE = r"(?:\s*,?\s*(?:maybe|perhaps|possibly)\b)?"
MORE_LETTERS = re.compile(  # ", B", "or B", "(or, maybe, B)", "as well as B"
    rf"\s*[(\[]?\s*(?:,\s*(?:or\b|and\b)?|/|&|\+|or\b|and\b|as\s+well\s+as\b){MAYBE}\s*,?\s*(?:option\s+|choice\s+)?"
    r"[(\[]?(?:[A-D](?![\w'\u2019+-])|[a-d](?=\s*(?:[.,;:!)\]}]|or\b|and\b|$)))[)\]]?"
    r"(?!\s+(?:is|are|was)\s+(?:wrong|incorrect|not|false)\b)"
)
CHOICE = r"\s*(?:(?:most\s+)?(?:likely|probably|definitely|clearly)\s+)?(?:the\s+)?(?:letter\s+|option\s+|choice\s+)?"
TO_QUESTION = r"(?:\s+to\s[^.\n]{0,60}?)?"
IS = r"(?:\s+(?:is|would\s+be|should\s+be|must\s+be)\b|\s*[:=])"
STATEMENTS = (  # the most explicit kind comes first, and the others are read only where it does not occur
    re.compile(rf"(?i:(?:correct|right|best|final)\s+(?:answer|option|choice){TO_QUESTION}{IS}{CHOICE}):?\s*{LETTER}"),
    re.compile(rf"(?i:answer{TO_QUESTION}{IS}{CHOICE}):?\s*{LETTER}"),
    re.compile(
        rf"(?m:^|\.\s)\s*(?i:(?:I\s+)?(?:think|believe|say|so|thus|therefore|hence)?,?\s*(?:that\s+)?"
        rf"(?:option\s+|choice\s+)?){LETTER}\s+is\s+(?:the\s+)?(?:most\s+)?(?:correct|right|best)"
        r"(?:\s+(?:answer|option|choice))?(?=\s*(?:[.,;!\n]|\Z|because\b|since\b))"
    ),
    re.compile(
        rf"(?m:^)\W{{0,20}}(?i:(?:option|choice)\s+)?{LETTER}(?=\s*(?:[.,;:)\]}}\n]|$|because\b|since\b|or\b|and\b))"
    ),
    re.compile(rf"(?i:\b(?:option|choice|choose|pick|select|it\s+is|it's)\s+(?:option\s+)?){LETTER}"),
    re.compile(r"[(\[]([A-D])[)\]]()"),
)
# Digits in groups of three or plain, with decimals: 1,234.50 and 72 and .5
NUMBER = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\w)\.[0-9]+")
# Behind a word or a number it is a hyphen or a subtraction, before a space that of a list.
SIGN = re.compile(r"(?:\A|[^\w)\]])[-\u2212\u2013]\\?[$€£]?\Z")


def parse_mmlu_response(mmlu_example: Mapping[str, Any], model_output: str) -> str | None:
    """Return the letter that a response to a multiple-choice question answers with, or None.

    The prompt asks for a sentence "The correct answer is _". A letter is read from such a sentence first, then from
    other forms: a letter at the beginning, "option C", "(C)". Of the first form that occurs, all letters must agree.

    Args:
        mmlu_example: `options` are the four answers. They say how many letters there are.
        model_output: the response.

    >>> example = {"options": ["100", "1", "10", "unknown"]}
    >>> parse_mmlu_response(example, "A bad answer is B"), parse_mmlu_response(example, "(C)")
    ('B', 'C')
    >>> parse_mmlu_response(example, "The answer is A or B") is None
    True
    """
    text = QUOTED.sub(lambda match: match[1] or match[2], MARKUP.sub("", model_output))
    # One space or newline for many: the patterns above would try each division of a long row of them.
    text = re.sub(r"\s+", lambda space: "\n" if "\n" in space[0] else " ", text)
    for statement in STATEMENTS:
        found = set()
        for match in statement.finditer(text):
            letter = (match[1] or match[2]).upper()
            rest = text[match.end() :]
            if letter == "A" and match[0].endswith("A") and AFTER_ARTICLE.match(rest):
                continue
            if MORE_LETTERS.match(rest):
                return None
            found.add(letter)
        if found:
            letter = found.pop()
            return None if found or letter not in "ABCD"[: len(mmlu_example["options"])] else letter
    return None


def parse_gsm8k_response(model_output: str) -> str | None:
    """Return the last number of a response, without commas between thousands, or None if it has no digit.

    >>> parse_gsm8k_response("It costs $1,234."), parse_gsm8k_response("so x = -3"), parse_gsm8k_response("72.")
    ('1234', '-3', '72')
    """
    numbers = list(NUMBER.finditer(model_output))
    if not numbers:
        return None
    last = numbers[-1]
    is_negative = SIGN.search(model_output[max(0, last.start() - 4) : last.start()])
    return ("-" if is_negative else "") + last[0].replace(",", "")


def last_number_reward(response: str, ground_truth: str) -> dict[str, float]:
    """Reward a response whose last number equals that of the ground truth: GSM8K's score as a reward function.

    format_reward is 1 where the response has a number. Used as reward=supplement/answer_parsers.py:last_number_reward.

    >>> last_number_reward("He pays $5.00.", "5")
    {'reward': 1.0, 'format_reward': 1.0, 'answer_reward': 1.0}
    """
    answer, truth = parse_gsm8k_response(response), parse_gsm8k_response(ground_truth)
    is_right = float(answer is not None and truth is not None and equals_number(answer, truth))
    return {"reward": is_right, "format_reward": float(answer is not None), "answer_reward": is_right}


def equals_number(answer: str, truth: str) -> bool:
    """Return whether two numbers in digits are equal.

    >>> equals_number("5.00", "5"), equals_number("72", "27")
    (True, False)
    """
    return Decimal(answer) == Decimal(truth)
