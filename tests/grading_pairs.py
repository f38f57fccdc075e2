r"""Pairs of unequal answers, made from a data set's own answers: the grader must accept none of them.

    uv run python tests/grading_pairs.py answers.jsonl [--pairs 10000] [--seed 0]

Each line of the file is a record with the key `answer`. Half of the pairs are two answers of the same shape, such as
`\frac{3}{7}` and `\frac{5}{7}`. The others are an answer and a damaged copy of it: a digit, a sign, a bracket, a
relation or a unit is changed. The table `DAMAGES` holds what can be done to an answer. The pairs that the grader
accepts are printed, to be checked by hand.
"""

import argparse
import json
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from plainrl.cli import run_main
from plainrl.grading.rewards import grade_answer
from plainrl.records import UserError

Damage = Callable[[str, random.Random], str | None]
COMMAND = re.compile(r"\\(?:left|right|!|,|;|:| )|\s")
UNITS = ("cm", "miles", "hours", "square feet", "kg", "minutes", "dollars")


def replace_one(pattern: str, choices: dict[str, Sequence[str]]) -> Damage:
    """Return a damage that replaces one match of a pattern by another text that its choices allow."""

    def damage(text: str, generator: random.Random) -> str | None:
        matches = list(re.finditer(pattern, text))
        if not matches:
            return None
        match = generator.choice(matches)
        return text[: match.start()] + generator.choice(choices[match[0]]) + text[match.end() :]

    return damage


def change_digit(text: str, generator: random.Random) -> str | None:
    """Replace one digit by another that is not zero, but not where only the tail of an approximation would change."""
    positions = [match.start() for match in re.finditer(r"\d", text)]
    if not positions or "approx" in text:
        return None
    position = generator.choice(positions)
    digit = generator.choice([digit for digit in "123456789" if digit != text[position]])
    return text[:position] + digit + text[position + 1 :]


def negate(text: str, generator: random.Random) -> str | None:
    """Put a minus sign before a number or a root that is not zero, or drop it."""
    if text.startswith("-"):
        return text[1:] if re.fullmatch(r"[1-9\\][^-+,=<>]*", text[1:]) else None
    return f"-{text}" if re.fullmatch(r"[1-9]\d*|\\[dt]?frac\{\d+\}\{\d+\}|\d*\\sqrt\{\d+\}", text) else None


def rotate_tuple(text: str, generator: random.Random) -> str | None:
    """Put the first entry of a tuple of numbers last."""
    match = re.fullmatch(r"\(([^()\[\]]*)\)", text)
    items = [item.strip() for item in match[1].split(",")] if match else []
    return f"({', '.join([*items[1:], items[0]])})" if len(set(items)) > 1 else None


def swap_numerator(text: str, generator: random.Random) -> str | None:
    """Turn one fraction upside down."""
    match = re.search(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", text)
    if match is None or match[1] == match[2]:
        return None
    return f"{text[: match.start()]}\\frac{{{match[2]}}}{{{match[1]}}}{text[match.end() :]}"


def change_unit(text: str, generator: random.Random) -> str | None:
    """Replace a unit by another one."""
    match = re.search(r"\\text\{\s*([a-z ]+)\}", text)
    others = [unit for unit in UNITS if match and unit not in match[1] and match[1].strip() not in unit]
    return f"{text[: match.start()]}\\text{{ {generator.choice(others)}}}{text[match.end() :]}" if match else None


def misplace_point(text: str, generator: random.Random) -> str | None:
    """Make a whole number ten or a thousand times as large, or a percentage or a decimal a tenth of it."""
    if re.fullmatch(r"[1-9]\d*", text):
        return generator.choice([f"{text}0", f"{text}000", f"0.{text}", f"{text}.{text}", f"{text}0\\%"])
    return f"0.{text}" if re.fullmatch(r"[1-9]\d*\\%", text) else None


def round_off(text: str, generator: random.Random) -> str | None:
    """Write a fraction or a multiple of pi as a decimal that is only close to it."""
    if match := re.fullmatch(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", text):
        value = int(match[1]) / int(match[2])
        rounded = f"{value:.{generator.choice((2, 3))}f}"
        return rounded if abs(float(rounded) - value) > 1e-9 else None
    match = re.fullmatch(r"(\d*)\s*\\pi", text)
    return f"{3.14159 * int(match[1] or 1):.2f}" if match else None


def add_wrong_tail(text: str, generator: random.Random) -> str | None:
    """Write a wrong value, and that it is close to the right one."""
    wrong = change_digit(text, generator)
    return None if wrong is None or re.search(r"[,=<>]|approx|text|box", text) else rf"{wrong} \approx {text}"


def drop_item(text: str, generator: random.Random) -> str | None:
    """Drop the last item of a list of numbers, or write two numbers as one."""
    items = re.split(r",\s*", text)
    if len(items) < 2 or len(set(items)) < len(items) or not all(re.fullmatch(r"-?\d+", item) for item in items):
        return None
    is_grouped = all(len(item) == 3 for item in items[1:])  # 1,234 is one number
    return None if is_grouped else generator.choice([", ".join(items[:-1]), f"{text}, 9999", "".join(items)])


DAMAGES: dict[str, Damage] = {
    "digit": change_digit,
    "sign": negate,
    "sign within": replace_one(r"(?<=[\dxyz}] )[-+](?= [\dxyz\\])", {"+": "-", "-": "+"}),
    "order": rotate_tuple,
    "fraction": swap_numerator,
    "unit": change_unit,
    "point": misplace_point,
    "rounded": round_off,
    "tail": add_wrong_tail,
    "item": drop_item,
    "bracket": replace_one(r"(?<=\d)[)\]]$", {")": "]", "]": ")"}),
    "relation": replace_one(r"<|>|\\leq?(?![a-z])|\\geq?(?![a-z])", {
        "<": [">", r"\le "], ">": ["<", r"\ge "], r"\le": [r"\ge ", "<"], r"\leq": [r"\geq ", "<"],
        r"\ge": [r"\le ", ">"], r"\geq": [r"\leq ", ">"],
    }),
    "letter": replace_one(r"(?<![\\A-Za-z{])[xyzabn](?![A-Za-z{])(?! *\\in)", dict.fromkeys("xyzabn", "kmpq")),
    "function": replace_one(r"\\(?:sin|cos|tan|ln)(?![a-z])", {
        r"\sin": [r"\cos"], r"\cos": [r"\tan"], r"\tan": [r"\sin"], r"\ln": [r"\sin"],
    }),
    "symbol": replace_one(r"\\pi(?![a-z])|\\sqrt(?=\{)|\\infty", {r"\pi": "3", r"\sqrt": "5", r"\infty": "7"}),
    "exponent": replace_one(r"\^[2-9]", {f"^{power}": [f"^{power - 1}", f"^{{1{power}}}"] for power in range(2, 10)}),
}  # fmt: skip


def make_unequal_pairs(answers: Sequence[str], num_pairs: int, seed: int) -> list[tuple[str, str, str]]:
    """Return pairs of answers that are not equal, the same ones for the same seed.

    Args:
        answers: right answers of a data set.
        num_pairs: how many pairs to make; fewer are returned where the answers do not give as many.
        seed: of the choices.

    Returns:
        Triples: what was done, the wrong answer, the right answer.
    """
    generator = random.Random(seed)
    answers = list(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
    shapes = defaultdict(list)
    for answer in answers:
        shapes[_normalize(re.sub(r"\d+", "N", answer))].append(answer)
    groups = [group for group in shapes.values() if len(group) > 1]
    usable = {name: [text for text in answers if damage(text, generator)] for name, damage in DAMAGES.items()}
    names = [name for name in DAMAGES if usable[name]]
    pairs: dict[tuple[str, str], str] = {}
    for turn in range(20 * num_pairs):
        if len(pairs) == num_pairs:
            break
        if turn % 2 and groups:
            name = "same shape"
            wrong, right = generator.sample(generator.choice(groups), 2)
        elif names:
            name = names[turn // 2 % len(names)]
            right = generator.choice(usable[name])
            wrong = DAMAGES[name](right, generator) or right
        else:
            continue
        is_reordered = name == "same shape" and sorted(_normalize(wrong)) == sorted(_normalize(right))
        if _normalize(wrong) != _normalize(right) and not is_reordered:  # 1+2 may equal 2+1
            pairs.setdefault((wrong, right), name)
    return [(name, wrong, right) for (wrong, right), name in pairs.items()]


def _normalize(text: str) -> str:
    """Return an answer without spaces and what does not change its value, in an order of its own for lists."""
    text = re.sub(r"\\[dt]frac", r"\\frac", COMMAND.sub("", text))
    text = re.sub(r"\\\$|\\%|\^\{?\\circ\}?|^[a-z]=", "", text)
    items = text.split(",")
    return ",".join(sorted(items) if re.fullmatch(r"[^()\[\]]*", text) else items)


def main(arguments: list[str]) -> None:
    """Grade the pairs that a file's answers give, and print those that are accepted."""
    parser = argparse.ArgumentParser(description="Pairs of unequal answers, which the grader must not accept.")
    parser.add_argument("answers", type=Path, help="JSON lines with the key answer")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        answers = [json.loads(line)["answer"] for line in options.answers.read_text("utf-8").splitlines() if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{options.answers}: {error!r}; give a file of JSON records with the key answer") from None
    pairs = make_unequal_pairs(answers, options.pairs, options.seed)
    started = time.perf_counter()
    accepted = [(name, *pair) for name, *pair in pairs if grade_answer(*pair).rewards["reward"]]
    for name, wrong, right in accepted:
        print(f"accepted: {wrong!r} against {right!r} ({name})")
    print(f"{len(pairs)} unequal pairs, {len(accepted)} accepted, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run_main(main)
