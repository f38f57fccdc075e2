r"""Whether two answers are equal mathematically. Four layers, the cheapest first, each decide or pass on:

    text         equal once both are in one spelling (spelling.py); words are compared without case
    structure    lists and sets (in any order), tuples, intervals with their brackets, unions, matrices, equations,
                 inequalities, \pm: compared part by part
    quantities   a number and its unit: an answer may leave the unit out, but not give another one
    values       of expressions, exactly or to many digits (expressions.py)

Equality has no direction, but it is not transitive. 20\% equals 20, because the sign is a matter of form, and it equals
0.2, because that is what the sign means; but 20 is not 0.2. So it is with degrees and radians.
"""

import itertools
import re
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from plainrl.grading.expressions import SECONDS_PER_ANSWER, VARIABLE, constant, factor_between, sign
from plainrl.grading.spelling import MAX_ANSWER_CHARS, NUMBER_WORDS, tidy

MAX_DEPTH = 24  # of nested brackets; deeper answers are compared as text only
MAX_ITEMS = 40  # of a list, set or matrix; longer ones are compared as text only

# ("leaf", text) or (kind, parts). A kind is list, set, union, matrix, row, or the two brackets of a tuple or interval.
Node = tuple[str, Any]

RELATIONS = {r"\le": "<=", r"\lt": "<", "<": "<", r"\ge": ">=", r"\gt": ">", ">": ">", r"\ne": "!=", "=": "="}
MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}
# What stands before the sign of x = 5, f(x) = 5, f(10) = 5, P(X=2) = 0.5, (x,y) = 5, AB = 5 and Area = 5
NAME = (
    rf"{VARIABLE}(?:\^\{{-1\}})?(?:\((?:\w|(?:[A-Z]=)?-?\d+(?:\.\d+)?)\))?|\({VARIABLE}(?:,{VARIABLE})+\)|"
    r"\\text\{[^{}]*\}|[A-Za-z]{4,12}|[A-Z]{2,3}|m?\\angle [A-Z]{1,3}"
)
# A, (A), or with its value, (A) 5, and no other choice or word that takes it back
CHOICE = re.compile(
    r"\(?([A-Z])\)?|\\choice\{(.)\}(?!.*(?:\([A-Z]\)|(?<![A-Za-z\\])[A-J][.:)]|\b(?:or|not|wrong|false)\b))[^,]*"
)
# A separator (group 1), or what opens or closes: the separator counts where nothing is open
COMMA, UNION, RELATION = (
    re.compile(rf"({separator})|\\[A-Za-z]+|\\?[{{}}]|[()\[\]]|\\.")
    for separator in (",", r"\\cup(?![A-Za-z])", r"\\(?:l[et]|g[et]|ne)(?![A-Za-z])|[<>=]")
)
WORD = re.compile("[A-Z]{3,}|[IVX]{2,}|no|on|yes")
SCALES = {"": "{}", "%": "({})/100", "degree": r"({})\pi/180", "radian": "{}"}  # what these units mean
TABLE = Path(__file__).with_name("units.tsv").read_text(encoding="utf-8").splitlines()
KINDS = dict(line.split("\t") for line in TABLE if not line.startswith("#"))
NO_UNITS = {*KINDS.pop("no unit").split()}  # words that change the value of a number before them
NO_UNIT = re.compile("(?:eleven|[a-z]+teen|[a-z]+tie|[a-z]+illion)ths?")  # nor are further fractions
UNITS = {  # the unit that each spelling stands for
    form: spellings[0]
    for spellings in (re.split("[=,]", entry) for entry in " ".join(KINDS.values()).split())
    for spelling in spellings
    for form in (spelling, f"{spelling}s" if len(spelling) > 2 else spelling)
}


def answers_match(answer: str, ground_truth: str) -> bool:
    r"""Return whether an answer equals the ground truth mathematically; raise GradingError if that takes too long.

    >>> answers_match("1,234", "1234"), answers_match(r"\frac12", "0.5"), answers_match("2", "3")
    (True, True, False)
    """
    if max(len(answer), len(ground_truth)) > MAX_ANSWER_CHARS:
        return answer.strip() == ground_truth.strip() != ""
    are_alike = re.sub(r",\s+", ",", answer) == re.sub(r",\s+", ",", ground_truth)  # 121, 484 and 121,484
    answer, ground_truth = tidy(answer), tidy(ground_truth)
    if answer == ground_truth or are_alike or _same_words(answer, ground_truth):
        return answer != ""
    if not (answer and ground_truth and _has_sound_brackets(answer) and _has_sound_brackets(ground_truth)):
        return False  # an incomplete answer is wrong
    return _nodes_match(_parse(answer), _parse(ground_truth), time.thread_time() + SECONDS_PER_ANSWER)


def _has_sound_brackets(text: str) -> bool:
    """Return whether all brackets close and are not too deep; round ones may close square ones, as in [1,2)."""
    counts = [0, 0]
    for bracket in re.findall(r"[()\[\]{}]", text):
        counts[bracket in "{}"] += 1 if bracket in "([{" else -1
        if min(counts) < 0 or sum(counts) > MAX_DEPTH:
            return False
    return counts == [0, 0]


def _split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Split a text at the separators outside of all brackets; return the parts and the separators."""
    parts, separators, depth, start = [], [], 0, 0
    for match in separator.finditer(text):
        if match[1] is None:
            depth += (match[0][-1] in "([{" or match[0] == r"\begin") - (match[0][-1] in ")]}" or match[0] == r"\end")
        elif depth == 0:
            parts.append(text[start : match.start()].strip())
            separators.append(match[0].strip())
            start = match.end()
    return [*parts, text[start:].strip()], separators


def _relation(text: str) -> tuple[list[str], list[str]]:
    """Return the sides of an equation or inequality, and the relations between them."""
    sides, signs = _split(text, RELATION)
    return sides, [RELATIONS[sign] for sign in signs]


def _parse(text: str) -> Node:
    """Return the structure of a tidied answer."""
    items = _split(text, COMMA)[0]
    if len(items) > 1:
        return "list", _flat([_parse(item) for item in items])
    name, value = _split_name(text)
    if name is not None:
        node = _parse(value)
        return node if node[0] != "leaf" else ("leaf", text)
    parts = _split(text, UNION)[0]
    if len(parts) > 1:
        return "union", [_parse(part) for part in parts]
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set", _flat([_parse(item) for item in _split(text[2:-2], COMMA)[0] if text[2:-2]])
    if matrix := re.fullmatch(r"(-?[^-+,=<>]*?)\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", text):
        before, after = {"": ("", ""), "-": ("-(", ")")}.get(matrix[1], (f"({matrix[1]})(", ")"))
        rows = [row.split("&") for row in matrix[2].split(r"\\") if row.strip()]
        return "matrix", [("row", [_parse(f"{before}{cell.strip()}{after}") for cell in row]) for row in rows]
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _has_sound_brackets(text[1:-1]):
        items = _split(text[1:-1], COMMA)[0]
        if len(items) > 1:
            nodes = [_parse(item) for item in items]
            several = [place for place, node in enumerate(nodes) if node[0] == "list"]  # of \pm
            if len(several) != 1:
                return text[0] + text[-1], nodes
            before, after = nodes[: several[0]], nodes[several[0] + 1 :]
            return "list", [(text[0] + text[-1], [*before, one, *after]) for one in nodes[several[0]][1]]
    if len(re.findall(r"\\pm(?![A-Za-z])", text)) == 1 and not _relation(text)[1]:  # several may be independent
        signs = ({"p": "+", "m": "-"}, {"p": "-", "m": "+"})
        return "list", [("leaf", re.sub(r"\\(p|m)[pm](?![A-Za-z])\s?", lambda m, s=s: s[m[1]], text)) for s in signs]
    return "leaf", text


def _flat(nodes: Sequence[Node]) -> list[Node]:
    """Return nodes, with the parts of a list instead of the list."""
    return [part for node in nodes for part in (node[1] if node[0] == "list" else [node])]


def _split_name(text: str) -> tuple[str | None, str]:
    """Return the name and the value of `x = 5`, `5 = x` or `f(x) = x + 1`; None and the text if it names nothing."""
    sides, relations = _relation(text)
    if relations == ["="] and all(sides):
        for name, value in (sides, sides[::-1]):
            is_defined = "(" in name or not re.search(rf"(?<![A-Za-z\\]){re.escape(name)}(?![A-Za-z])", value)
            if is_defined and re.fullmatch(NAME, name):
                return name, value
    return None, text


def _nodes_match(one: Node, other: Node, deadline: float) -> bool:
    match = partial(_nodes_match, deadline=deadline)
    if one[0] == "leaf" == other[0]:
        return _leaves_match(one[1], other[1], deadline)
    for a, b in ((one, other), (other, one)):
        if (a[0] == "union" or len(a[0]) == 2) and b[0] in ("leaf", "list") and (region := _as_region(b)) is not None:
            return match(a, region)
        values = _assigned_values(a)
        if values and b[0] in ("list", "()") and _assigned_values(b) is None:
            if len(values) == len(b[1]) and all(map(match, values, b[1])):
                return True
            return b[0] == "list" and _are_numbered(a) and _is_permutation(values, b[1], match)
        if a[0] == "matrix" and b[0] == "()":  # a column is a vector
            return match(("()", [row[1][0] if len(row[1]) == 1 else row for row in a[1]]), b)
    kinds, a, b = {one[0], other[0]}, one[1], other[1]
    if "leaf" in kinds or max(len(a), len(b)) > MAX_ITEMS:
        return False
    if kinds <= {"list", "set"} and "set" in kinds:
        return _is_permutation(_distinct(a, match), _distinct(b, match), match)
    if kinds in ({"list"}, {"union"}):
        return _is_permutation(a, b, match)
    return len(kinds) == 1 and len(a) == len(b) and all(map(match, a, b))


def _distinct(nodes: Sequence[Node], match: Callable[[Node, Node], bool]) -> list[Node]:
    distinct: list[Node] = []
    for node in nodes:
        if not any(match(node, known) for known in distinct):
            distinct.append(node)
    return distinct


def _is_permutation(ones: Sequence[Node], others: Sequence[Node], match: Callable[[Node, Node], bool]) -> bool:
    """Return whether the nodes match one to one. Equality is not transitive, so a first match may have to give way."""
    if len(ones) != len(others):
        return False
    partners: dict[int, Node] = {}  # of the others, by their index

    def find_partner(one: Node, tried: set[int]) -> bool:
        for index, other in enumerate(others):
            if index not in tried and match(one, other):
                tried.add(index)
                if index not in partners or find_partner(partners[index], tried):
                    partners[index] = one
                    return True
        return False

    return all(find_partner(one, set()) for one in ones)


def _are_numbered(node: Node) -> bool:
    """Return whether the names of x_1 = 3, x_2 = 2 differ in their index alone."""
    names = [_split_name(part[1])[0] or "" for part in node[1]]
    return len({name.partition("_")[0] for name in names}) == 1 and all("_" in name for name in names)


def _assigned_values(node: Node) -> list[Node] | None:
    """Return the values of p = 5, q = 2; None for any other node.

    They stand in the order of names that follow each other, such as x, y, z; of others, as they are written.
    """
    if node[0] != "list" or any(part[0] != "leaf" for part in node[1]):
        return None
    values = {name: value for name, value in map(_split_name, [part[1] for part in node[1]]) if name}
    names = sorted(values)
    follow = all(len(b) > 1 or ord(b) - ord(a[0]) == 1 for a, b in itertools.pairwise(names))
    return [_parse(values[name]) for name in (names if follow else values)] if len(values) == len(node[1]) else None


def _as_region(node: Node) -> Node | None:
    r"""Return the intervals that inequalities for one variable describe, and those that stand in a list.

    >>> _as_region(("leaf", "2<x")), _as_region(("leaf", "5=x"))
    (('()', [('leaf', '2'), ('leaf', '\\infty')]), None)
    """
    if node[0] == "list":
        regions = [_as_region(part) for part in node[1][:MAX_ITEMS]]
        bounds = [region[1] for region in regions if region and region[0] != "union"]
        ends = [(low[1], high[1]) for low, high in bounds if low[0] == high[0] == "leaf"]
        variables = {side for part in node[1] for side in _relation(str(part[1]))[0] if re.fullmatch(VARIABLE, side)}
        pairs = itertools.combinations(ends, 2)  # x > 1 and x < 2 is no union
        are_apart = all(sign(constant(b[0], a[1])) >= 0 or sign(constant(a[0], b[1])) >= 0 for a, b in pairs)
        return ("union", regions) if are_apart and len(ends) == len(node[1]) and len(variables) <= 1 else None
    if len(node[0]) == len(node[1]) == 2:
        return node if node[0] != "()" or any(part[1][-6:] == r"\infty" for part in node[1]) else None  # or a point
    sides, relations = _relation(node[1]) if node[0] == "leaf" else ([""], [])
    if relations and (re.fullmatch(VARIABLE, sides[-1]) if len(sides) == 2 else relations[0][0] == ">"):
        sides, relations = sides[::-1], [MIRRORED[relation] for relation in reversed(relations)]
    if len(sides) == 2 and re.fullmatch(VARIABLE, sides[0]):
        below, above = [("leaf", r"-\infty"), ("leaf", sides[1])], [("leaf", sides[1]), ("leaf", r"\infty")]
        both = ("union", [("()", below), ("()", above)])
        regions = {"<": ("()", below), "<=": ("(]", below), ">": ("()", above), ">=": ("[)", above), "!=": both}
        return regions.get(relations[0])
    if len(sides) == 3 and re.fullmatch(VARIABLE, sides[1]) and set(relations) <= {"<", "<="}:
        brackets = "(["[relations[0] == "<="] + ")]"[relations[1] == "<="]
        return brackets, [("leaf", sides[0]), ("leaf", sides[2])]
    return None


def _leaves_match(one: str, other: str, deadline: float) -> bool:
    if not one or not other or one == other:
        return one == other != ""
    (sides, relations), (other_sides, other_relations) = _relation(one), _relation(other)
    if relations and other_relations:
        return _relations_match(one, other, deadline)
    if WORD.fullmatch(one) and WORD.fullmatch(other):
        return False  # SAS and SSA, VI and IV: letters in an order, and no product
    if not relations and not other_relations:
        return _same_words(one, other) or _quantities_match(one, other, deadline)
    equation, sides, bare = (one, sides, other) if relations else (other, other_sides, one)
    name, value = _split_name(equation)
    if name is not None:
        sides = [value]
    elif len(sides) > 2 and re.fullmatch(NAME, sides[0]):
        sides = sides[1:]
    is_equation = {*relations, *other_relations} == {"="} and len(sides) <= 4
    return is_equation and all(_leaves_match(side, bare, deadline) for side in sides)


def _relations_match(one: str, other: str, deadline: float) -> bool:
    """Return whether two equations or inequalities are the same, perhaps turned round or multiplied by a number."""
    (sides, relations), (other_sides, other_relations) = _relation(one), _relation(other)
    if len(relations) != len(other_relations) or len(relations) > 3:
        return False
    mirrored = [MIRRORED[relation] for relation in reversed(other_relations)]
    for their_sides, their_relations in ((other_sides, other_relations), (other_sides[::-1], mirrored)):
        pairs = zip(sides, their_sides, strict=True)
        if relations == their_relations and all(_leaves_match(x, y, deadline) for x, y in pairs):
            return True
    if len(relations) == 1 and relations in (other_relations, mirrored):
        factor = factor_between(tuple(sides), tuple(other_sides), deadline)
        return factor != 0 and relations == (other_relations if factor > 0 else mirrored)
    return False


def _same_words(one: str, other: str) -> bool:
    r"""Return whether two answers are the same words, or the same choice.

    >>> _same_words(r"\text{(A)}", "A"), _same_words(r"\text{odd}", "Odd"), _same_words("xy", "XY")
    (True, True, False)
    """
    plain, other_plain = (re.sub(r"\\text\{([^{}\\]*)\}", r"\1", text) for text in (one, other))
    choice, other_choice = map(CHOICE.fullmatch, (plain, other_plain))
    if choice and other_choice:
        return (choice[1] or choice[2]) == (other_choice[1] or other_choice[2]) and bool(choice[1] or other_choice[1])
    is_text = re.search(
        r"\\text|[A-Za-z]{4}|^(?:no|yes|(?-i:[A-Z][a-z]{2}))$", f"{one}\n{other}", re.IGNORECASE | re.MULTILINE
    )
    is_same = is_text and plain.lower() == other_plain.lower()
    return bool(is_same and re.fullmatch(r"[A-Za-z][A-Za-z0-9' ,.:/-]+", plain))


def _quantities_match(one: str, other: str, deadline: float) -> bool:
    """Return whether two quantities are equal as they are written, or by what a percent sign or a degree means."""
    (value, unit), (other_value, other_unit) = _split_unit(one), _split_unit(other)
    # "% increase" is a percentage, and dollars per something are dollars
    kind, other_kind = (re.sub("^(dollar)/.*| .*", r"\1", text) for text in (unit, other_unit))
    is_same = unit == other_unit or (kind == other_kind and kind in (unit, other_unit))
    pairs = [(value, other_value)] if is_same or not unit or not other_unit else []
    if kind != other_kind and ({kind, other_kind} <= {"", "%"} or {kind, other_kind} <= {"", "degree", "radian"}):
        pairs.append((SCALES[kind].format(value), SCALES[other_kind].format(other_value)))
    pairs = [sorted(text.removeprefix("+") for text in pair) for pair in pairs]  # equality has no direction
    return any(x == y or factor_between((x,), (y,), deadline) == 1 for x, y in pairs)


def _split_unit(text: str) -> tuple[str, str]:
    r"""Return the value of a quantity and its unit, which is empty if there is none.

    >>> [_split_unit(text) for text in (r"5\text{cm}^2", r"\$5", r"90^\circ", "5x", "five dollars")]
    [('5', 'cm^2'), ('5', 'dollar'), ('90', 'degree'), ('5x', ''), ('5', 'dollar')]
    """
    words = re.fullmatch(r"(\\text\{)?([A-Za-z-]+)( [A-Za-z ]+)?(?(1)\})", text)
    if words and words[2].lower() in NUMBER_WORDS:
        text = f"{NUMBER_WORDS[words[2].lower()]}{words[3] or ''}"
    # $5 per hour, $5/hour. A single letter is no unit here either: $5/n
    if match := re.fullmatch(r"\\\$(-?[\d.,]*\d) ?((?:/ ?(?=[A-Za-z]{2}|\\text\{)|\\text\{|[A-Za-z]{2}).*)", text):
        quantity = "dollars " + re.sub(r"\\text\{([^{}]*)\}", r"\1", match[2])
        text = f"{match[1]} {quantity}" if _unit_name(quantity, None) else text  # million is no unit
    if match := re.match(r"(\\\$)|\\text\{(pound|euro)\}|(USD|EUR|Rs)\.? ?(?=-?[\d.])", text):
        return text[match.end() :], "dollar" if match[1] else UNITS[match[2] or match[3]]
    for end, unit in (("%", "%"), (r"^\circ", "degree")):
        value = text.removesuffix(end)
        if value != text and isinstance(constant(value.replace(r"\pi", "(1)")), Fraction):
            return value, unit
    in_text = re.fullmatch(r"(.*[^\s\\])\\text\{([A-Za-z./ -]{1,40}(?:\^\d)?)\}(?:\^(\d))?", text)
    # A single letter is none: 2 m may as well be a product
    match = in_text or re.fullmatch(r"([\d.,/+-]*\d|.*(?:[\d})%]|\\pi))( ?[A-Za-z][A-Za-z./ -]{1,39})(?:\^(\d))?", text)
    if not (match and (unit := _unit_name(match[2], match[3]))):
        return text, ""
    return (match[1][:-1], f"% {unit}") if match[1].endswith("%") else (match[1], unit)


def _unit_name(text: str, power: str | None) -> str | None:
    r"""Return a unit in one spelling, None if the words are none: things in the plural are units as well.

    >>> [_unit_name(text, None) for text in ("square inches", "mph", "right triangles", "wrong", "triangle")]
    ['inch^2', 'mile/hour', 'right triangle', None, None]
    """
    text = re.sub(r"\b(?:[A-Za-z]\.)+[A-Za-z]\b", lambda match: match[0].replace(".", ""), text)  # m.p.h, p.m
    text = re.sub(r"\.(?=[A-Za-z])", " ", text).replace(".", "").replace("-", " ")  # sq.ft
    text = re.sub(r"\b(?:per|p)\b", "/", re.sub(r"\bmph\b", "mile/hour", text))
    text = re.sub(r"\b(?:sq|squared?|(cu|cubic)) ([A-Za-z]+)", lambda match: f"{match[2]}^{3 if match[1] else 2}", text)
    text = re.sub(r"([A-Za-z]+) (?:squared|(cubed))\b", lambda match: f"{match[1]}^{3 if match[2] else 2}", text)
    names, head = [], ""  # the head is the last word, or that before "per" or "of"
    for word, exponent in re.findall(r"(/|[A-Za-z]+)(\^\d)?", text):
        is_plural = word not in UNITS and re.fullmatch(r"[a-z]{2,}[a-rt-z]s", word)
        if word.lower() in NO_UNITS or NO_UNIT.fullmatch(word.lower()):
            return None
        names.append(UNITS.get(word, word.removesuffix("s") if is_plural else word) + exponent)
        if not {"/", "of"} & {*names}:
            head = word if word in UNITS or is_plural else ""
    return " ".join(names).replace(" / ", "/") + (f"^{power}" if power else "") if head and len(names) <= 4 else None
