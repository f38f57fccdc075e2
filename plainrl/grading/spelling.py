r"""One spelling for the many in which an answer is written.

The rules are a table, spelling.tsv: each has a name, a pattern, what replaces it, and an example of a text before and
after. They change how an answer is written, never what it says. Each pattern takes time linear or quadratic in the
length of an answer, which is limited. The example of a rule is tested like this:

>>> rule = RULES["fractions"]
>>> rule.before, rule.pattern.sub(rule.replacement, rule.before)
('\\dfrac12', '\\frac12')
"""

import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

MAX_ANSWER_CHARS = 1000  # longer answers are compared as text only; no answer of MATH is nearly as long
GROUP = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"  # with up to two levels of braces inside
NAME = r"(?:[A-Za-z]|\\[a-z]{2,8})"
CHARACTERS = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u2010": "-", "π": r"\pi ", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "∞": r"\infty ", "\u00d7": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "±": r"\pm ",
    "∓": r"\mp ", "\u222a": r"\cup ", "∈": r"\in ", "≈": r"\approx ", "θ": r"\theta ", "\u03b1": r"\alpha ",
    "β": r"\beta ", "\u2215": "/", "∅": r"\emptyset ", "\u211d": r"\mathbb{R} ", "\u2044": "/", "¢": r"\text{cent}",
    "\u2019": "'", "\x0c": r"\f", "\x08": r"\b",
    "\u2103": r"^\circ C", "\u2109": r"^\circ F", "£": r"\text{pound}", "€": r"\text{euro}",
})  # fmt: skip
ONES = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = [f"{ten}-{one}" for ten in "twenty thirty forty fifty sixty seventy eighty ninety".split() for one in ONES]
NUMBER_WORDS = {word.removesuffix("-zero"): str(number) for number, word in enumerate([*ONES, *TEENS, *TENS])}
BASE_IN_WORDS = re.compile(rf"_\{{\s*\\text\s*\{{\s*({'|'.join(NUMBER_WORDS)})\s*\}}\s*\}}")
NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


class Rule(NamedTuple):
    """A spelling that is replaced, and an example of a text before and after."""

    before: str
    after: str
    replacement: str
    pattern: re.Pattern[str]


TABLE = Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8").replace("<GROUP>", GROUP).replace("<NAME>", NAME)
LINES = [line.split("\t") for line in TABLE.split("\n") if line and not line.startswith("#")]
RULES = {
    name: Rule(before, after, replacement, re.compile(pattern, re.ASCII | re.DOTALL))
    for name, before, after, replacement, pattern in LINES
}


@lru_cache(4096)
def tidy(text: str) -> str:
    r"""Return an answer without what carries no meaning, in one spelling.

    >>> tidy(r"$ \left( \dfrac{1}{2}, x^{2} \right) $."), tidy(r"1\,234"), tidy("3  1/2"), tidy(r"\\frac{3}{2}")
    ('(\\frac{1}{2},x^2)', '1234', '3\\frac{1}{2}', '\\frac{3}{2}')
    """
    if NUMBER.fullmatch(text):  # the most frequent answers need no rule
        return text
    if r"\begin" not in text or r"\\begin" in text:  # a doubled backslash, which is not the end of a row
        text = text.replace(r"\\", "\\")
    if not text.isascii():
        text = re.sub(r"√\s*(?:(\d+|[A-Za-z])|\(([^()]*)\))", r"\\sqrt{\1\2}", text)
        for sign, characters in (("^", "⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿ"), ("_", "₀-₉₊₋₍₎")):
            text = re.sub(f"[{characters}]+", lambda match, sign=sign: f"{sign}{{{_plain(match[0])}}}", text)
        text = re.sub("[¼-¾⅐-⅞]", lambda match: r"\frac{{{}}}{{{}}}".format(*_plain(match[0]).split("\u2044")), text)
        text = unicodedata.normalize("NFKC", text.translate(CHARACTERS))
    text = " ".join(text.split())  # long runs of spaces would take long
    for rule in RULES.values():
        text = rule.pattern.sub(rule.replacement, text)
    return BASE_IN_WORDS.sub(lambda match: f"_{NUMBER_WORDS[match[1]]}", text.strip())


def _plain(text: str) -> str:
    """Return super- and subscripts, and fractions in one character, as the characters that they are made of."""
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-")
