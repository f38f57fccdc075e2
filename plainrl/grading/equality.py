r"""Whether two answers are equal mathematically. Five layers, the cheapest first, each decide or pass on:

    text         equal once what carries no meaning is removed; words are compared without case
    structure    lists and sets (in any order), tuples, intervals with their brackets, unions, matrices, equations,
                 inequalities, \pm: compared part by part
    numbers      exactly, as fractions: 1,234  0.5  50\%  3\frac{1}{2}  1.2 \times 10^3  5 cm  90^\circ  \$5
    estimates    clearly different values at one point reject (estimate.py); they never accept
    symbols      parsed by math-verify's parser and evaluated by sympy, in a worker process (worker.py)

No Python is evaluated. Only expressions made of a closed set of tokens reach the parser. It is not sympy's own, which
would evaluate. Every pattern here takes time linear or quadratic in the length of an answer, which is limited.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, cast

from plainrl.grading.estimate import surely_different
from plainrl.grading.worker import Budget, expressions_equal

MAX_ANSWER_CHARS = 1000  # longer answers are compared as text only; no answer of MATH is nearly as long
MAX_DEPTH = 24  # of nested brackets; deeper answers are compared as text only
MAX_ITEMS = 40  # of a list, set or matrix; longer ones are compared as text only

# ("leaf", text) or (kind, parts). A kind is list, set, union, matrix, row, or the two brackets of a tuple or interval.
Node = tuple[str, Any]

OPENING, CLOSING = "([{", ")]}"
RELATIONS = {
    r"\leq": "<=", r"\le": "<=", r"\leqslant": "<=", "<": "<", r"\lt": "<",
    r"\geq": ">=", r"\ge": ">=", r"\geqslant": ">=", ">": ">", r"\gt": ">",
    r"\neq": "!=", r"\ne": "!=", "=": "=",
}  # fmt: skip
MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}
VARIABLE = r"(?:[A-Za-z]|\\[a-z]{2,8})(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]{1,4}\}))?"
COMMA = re.compile(",")
ENVIRONMENT = re.compile(r"\\(begin|end)(?=\{)")
UNION = re.compile(r"\\cup(?![A-Za-z])\s?")
RELATION = re.compile("|".join(rf"{re.escape(name)}(?![A-Za-z])" if name[0] == "\\" else name for name in RELATIONS))
MATRIX = re.compile(r"\(?\\begin\{([pb]?matrix)\}(.*)\\end\{\1\}\)?", re.DOTALL)
# The unit that each spelling stands for. An answer may leave its unit out, but not give another one.
UNITS = {
    unit: name
    for name, units in {
        "mm": "mm millimeter millimeters", "cm": "cm centimeter centimeters", "m": "m meter meters",
        "km": "km kilometer kilometers", "inch": "in inch inches", "foot": "ft foot feet", "yard": "yard yards",
        "mile": "mile miles mi", "g": "g gram grams", "kg": "kg kilogram kilograms", "pound": "lb lbs pound pounds",
        "ounce": "oz ounce ounces", "liter": "L l liter liters", "ml": "ml mL", "gallon": "gallon gallons",
        "second": "s sec second seconds", "minute": "min minute minutes", "hour": "h hr hour hours",
        "day": "day days", "week": "week weeks", "month": "month months", "year": "year years",
        "dollar": "dollar dollars", "cent": "cent cents", "unit": "unit units", "degree": "degree degrees",
        "mph": "mph", "square": "square sq", "cubic": "cubic cu", "per": "per",
        "people": "people person",
    }.items()
    for unit in units.split()
}  # fmt: skip
FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp".split()
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta lambda mu nu xi rho sigma tau phi varphi chi psi omega "
    "Gamma Delta Theta Lambda Sigma Phi Psi Omega"
).split()
COMMANDS = {*FUNCTIONS, *GREEK, *"frac sqrt pi infty cdot times div binom circ lfloor rfloor lceil rceil".split()}
TOKEN = re.compile(r"\\([A-Za-z]+)|\d+(?:\.\d+)?|\.\d+|[A-Za-z]|[-+*/^_!|(){}\[\]]| ")
# Plurals that are not units
NO_UNITS = (
    "times plus minus less tens dozens scores hundreds thousands millions billions trillions percents negatives "
    "halves thirds quarters fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths squares cubes "
    "roots logs"
).split()
# Sequences of these tokens that are no expression, or none that is safe to evaluate
NO_EXPRESSION = [
    re.compile(pattern)
    for pattern in (
        r"(?<![\\A-Za-z])[A-Za-z]{4}",  # a word
        r"__",
        r"(?:^|[^_\d])\d+ \d|\d\.\d*\.",  # two numbers, not one
        r"(?<!\{)\d_|\}_\d",  # a number in another base
        r"[-+*/^_({\[]$|[-+*/^_(\[{][)\]}*/^_!]|^[*/^_!)\]}]",  # something is missing
        r"\{\}|\(\)|\[\]|\\(?:frac|sqrt|binom|cdot|times|div)$",
        r"[-+]{3}",
        # numbers too large to compute: towers of powers, long exponents, factorials of factorials or large numbers
        r"\d\^\{?-?\d*\^|\^\{?-?\d{5}|\^\{[^{}]*\^[^{}]*\^|\^\{[^{}]*\{[^{}]*\^",
        r"\^.\^",  # LaTeX refuses it, and a long one takes seconds to parse
        r"!\)*!|\d{4}\)*!|\\binom\{?\d{4}|\}\{\d*\^|\^\{[^{}]*!|!\)*\^",
    )
]
RADICAL_SIGN = re.compile(r"√\s*(?:(\d+|[A-Za-z])|\(([^()]*)\))")
CHARACTERS = str.maketrans({
    "\u2212": "-", "π": r"\pi ", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ",
    "\u00d7": r"\times ", "·": r"\cdot ", "\u222a": r"\cup ", "∈": r"\in ", "²": "^2", "³": "^3",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
})  # fmt: skip
# Each line turns several spellings of the same into one
SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\\[()\[\]]", ""),  # \( \) \[ \], but not the \\ that ends a row of a matrix
        (r"(?<!\\)\$([^$]*[^$\\\s])\$", r"\1"),
        (r"\\(?:display|text)style(?![A-Za-z])", ""),
        (r"^[A-Za-z]\s*\\in(?![A-Za-z])\s*", ""),  # keep the interval of x \in [-2,7]
        (r"^\{([^{},\\]+)\}$", r"\1"),
        (r"^(-?)\\?\$(?=-?[\d.])", r"\\$\1"),  # $5 and -$5
        (r"\\(?:left|right)(?![A-Za-z])", ""),
        (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
        (r"(?<=\d)(?:\\[,!;:]|\{,\}|,\\!)(?=\d{3}(?!\d))", ""),  # 1\,234 and 1{,}234
        (r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\%", "%"),
        (r"\\(?:textbf|textit|textrm|mathrm|mathbf|mathit|mbox)(?=\s*\{)", r"\\text"),
        (r"\\text\s*\{\s*(?:or|and)\s*\}|(?<=[\d}\])])\s+(?:or|and)\s+(?=[-+\d\\({\[A-Za-z])", ","),
        (r"\\text\s*\{\s*(-?[\d.,/]*\d|[A-Z](?:\s*,\s*[A-Z])+)\s*\}", r"\1"),
        (r"\\text\s*\{\s*(-?[\d.,/]*\d)\s+([A-Za-z ]+)\}", r"\1\\text{\2}"),
        # 1,234, but not (1,234) or \{1,234\}: these may hold two numbers
        (r"(?<![\d,.(\[])(?<!\\\{)(\d{1,3}),(\d{3})(?:,(\d{3}))?(?:,(\d{3}))?(?![\d,)\]])(?!\\\})", r"\1\2\3\4"),
        (r"\\(?:emptyset|varnothing)(?![A-Za-z])", r"\\{\\}"),
        (r"\\frac\s*(\d)\s*(?=[\d{])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]{1,50}\})\s*(\d)", r"\1{\2}"),
        (r"\{\s*([^{}\\]{1,50})\\over\s+([^{}\\]{1,50})\}", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"([_^])\s*\{\s*([A-Za-z0-9]|\\circ)\s*\}", r"\1\2"),
        (r"\s+", " "),
        (r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", ""),
    )
]


def answers_match(answer: str, ground_truth: str) -> bool:
    r"""Return whether an answer equals the ground truth mathematically.

    Raises:
        GradingError: the comparison ran out of time or memory, or its process died.

    >>> answers_match("1,234", "1234"), answers_match(r"\frac12", "0.5"), answers_match("2", "3")
    (True, True, False)
    """
    if max(len(answer), len(ground_truth)) > MAX_ANSWER_CHARS:
        return answer.strip() == ground_truth.strip() != ""
    answer, ground_truth = tidy(answer), tidy(ground_truth)
    if not answer or not ground_truth:
        return False
    if answer == ground_truth:
        return True
    if not _has_sound_brackets(answer) or not _has_sound_brackets(ground_truth):
        return False  # an incomplete answer is wrong
    names, other_names = _names(answer), _names(ground_truth)
    if names and other_names and names != other_names:
        return False  # x = 3 is not y = 3
    return _nodes_match(_parse(answer), _parse(ground_truth), Budget())


def tidy(text: str) -> str:
    r"""Return an answer without what carries no meaning, in one spelling.

    >>> tidy(r"$ \left( \dfrac{1}{2}, x^{2} \right) $."), tidy(r"1\,234"), tidy("3  1/2")
    ('(\\frac{1}{2},x^2)', '1234', '3 1/2')
    """
    text = text.strip().removesuffix(".").strip()
    for dollars in ("$$", "$"):
        if len(text) > 2 * len(dollars) and text.startswith(dollars) and text.endswith(dollars):
            text = text.removeprefix(dollars).removesuffix(dollars).strip().removesuffix(".")
    if not text.isascii():
        text = RADICAL_SIGN.sub(r"\\sqrt{\1\2}", text).translate(CHARACTERS)
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    return text.strip()


def _has_sound_brackets(text: str) -> bool:
    """Return whether all brackets close and are not too deep; round ones may close square ones, as in [1,2)."""
    num_curly = num_round = 0
    for match in re.finditer(r"\\?[{}]|[()\[\]]", text):
        bracket = match[0][-1]
        step = 1 if bracket in OPENING else -1
        if bracket in "{}":
            num_curly += step
        else:
            num_round += step
        if min(num_curly, num_round) < 0 or num_curly + num_round > MAX_DEPTH:
            return False
    return num_curly == num_round == 0


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split a text at each match that stands outside of all brackets."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        match = separator.match(text, position) if depth == 0 else None
        if match:
            parts.append(text[start : match.start()])
            position = start = match.end()
            continue
        if text[position] == "\\":
            environment = ENVIRONMENT.match(text, position)
            if environment:
                depth += 1 if environment[1] == "begin" else -1
            position += 1  # of what follows a backslash, only \{ and \} are brackets
            if text[position : position + 1] not in "{}":
                position += 1
                continue
        depth += (text[position : position + 1] in OPENING) - (text[position : position + 1] in CLOSING)
        position += 1
    return [*parts, text[start:]]


def _parse(text: str) -> Node:
    """Return the structure of a tidied answer."""
    text = _without_name(text)
    items = _split(text, COMMA)
    if len(items) > 1:
        nodes = [_parse(item) for item in items]
        names = {_split_name(item)[0] for item in items}
        if len(names) > 1 and None not in names:  # in a = 2, b = 3 the names count
            nodes = [("leaf", item) for item in items]
        return "list", [part for node in nodes for part in (node[1] if node[0] == "list" else [node])]
    parts = _split(text, UNION)
    if len(parts) > 1:
        return "union", [_parse(part) for part in parts]
    if text.startswith(r"\{") and text.endswith(r"\}") and len(_split(text[2:-2], COMMA)) <= MAX_ITEMS:
        return "set", [_parse(item) for item in _split(text[2:-2], COMMA)] if text[2:-2] else []
    if matrix := MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        return "matrix", [("row", [_parse(cell.strip()) for cell in row.split("&")]) for row in rows]
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closes_last(text):
        items = _split(text[1:-1], COMMA)
        if len(items) > 1:
            return text[0] + text[-1], [_parse(item) for item in items]
    if r"\pm" in text and not RELATION.search(text):
        signs = [("+", "-"), ("-", "+")]
        branches = [re.sub(r"\\pm\s?", plus, re.sub(r"\\mp\s?", minus, text)) for plus, minus in signs]
        return "list", [("leaf", branch.removeprefix("+")) for branch in branches]
    return "leaf", text


def _split_name(text: str) -> tuple[str | None, str]:
    """Return the variable that `x = 5`, `5 = x` or `(x, y) = ...` names, None if there is none, and the value."""
    match = re.match(rf"({VARIABLE}(?:\([A-Za-z0-9]\))?|\({VARIABLE}(?:,{VARIABLE})+\))=", text)
    if match and len(_split(text, RELATION)) == 2:
        return match[1], text[match.end() :]
    if match := re.fullmatch(rf"(.*)=({VARIABLE})", text):
        return match[2], match[1]
    return None, text


def _names(text: str) -> set[str]:
    """Return the variables that the parts of an answer name: `{"x"}` for `x = 1, x = 2` and for `5 = x`."""
    return {name for item in _split(text, COMMA) if (name := _split_name(item)[0]) is not None}


def _without_name(text: str) -> str:
    """Return the value that an answer names: `5` of `x = 5`, `5 = x`, `(x, y) = 5` and `f(x) = 5`.

    An equation such as `y = 2x`, whose value holds a variable, stays whole.
    """
    name, value = _split_name(text)
    if name is None:
        return text
    constants = r"\\text\{[^{}]*\}|(?<![A-Za-z])[ei](?![A-Za-z])"
    has_variable = re.search(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", re.sub(constants, "", value))
    is_equation = has_variable or len(_split(value, RELATION)) > 1
    return text if is_equation and "(" not in name else value


def _closes_last(text: str) -> bool:
    """Return whether the bracket that opens a text is closed by the one at its end."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth == 0:
            return position == len(text) - 1
    return False


def _nodes_match(one: Node, other: Node, budget: Budget) -> bool:
    if one[0] == "leaf" == other[0]:
        return _leaves_match(one[1], other[1], budget)
    kinds, a, b = {one[0], other[0]}, one[1], other[1]
    if max(len(a), len(b)) > MAX_ITEMS:
        return False
    if kinds <= {"list", "set"} and "set" in kinds:
        return _is_subset(a, b, budget) and _is_subset(b, a, budget)
    if len(kinds) == 2 or len(a) != len(b):
        return False
    if kinds <= {"list", "union"}:
        return _is_permutation(a, list(b), budget)
    return all(_nodes_match(x, y, budget) for x, y in zip(a, b, strict=True))


def _is_subset(ones: Sequence[Node], others: Sequence[Node], budget: Budget) -> bool:
    return all(any(_nodes_match(one, other, budget) for other in others) for one in ones)


def _is_permutation(ones: Sequence[Node], others: list[Node], budget: Budget) -> bool:
    """Return whether the nodes match in some order. Equality is transitive, so the first match of each will do."""
    for one in ones:
        index = next((index for index, other in enumerate(others) if _nodes_match(one, other, budget)), None)
        if index is None:
            return False
        del others[index]
    return True


def _leaves_match(one: str, other: str, budget: Budget) -> bool:
    if not one or not other or one == other:
        return one == other != ""
    sides, relations = _relation(one)
    other_sides, other_relations = _relation(other)
    if relations or other_relations:
        mirrored = [MIRRORED[relation] for relation in reversed(other_relations)]
        return len(relations) <= 3 and any(
            relations == their_relations
            and all(_leaves_match(x, y, budget) for x, y in zip(sides, their_sides, strict=True))
            for their_sides, their_relations in ((other_sides, other_relations), (other_sides[::-1], mirrored))
        )
    words = _words(one)
    if words is not None and words == _words(other):
        return True
    one, unit = _split_unit(one)
    other, other_unit = _split_unit(other)
    if unit and other_unit and unit != other_unit:
        return False
    number, other_number = as_number(one), as_number(other)
    if number is not None and other_number is not None:
        return number == other_number
    if one == other:
        return True
    first, second = sorted((one, other))  # equality has no direction
    if not is_expression(first) or not is_expression(second) or surely_different(first, second):
        return False
    return expressions_equal(first, second, budget)


def _relation(text: str) -> tuple[list[str], list[str]]:
    """Return the sides of an equation or inequality, and the relations between them."""
    sides = _split(text, RELATION)
    signs, position = [], 0
    for side in sides[:-1]:
        position += len(side)
        match = cast(re.Match[str], RELATION.match(text, position))
        signs.append(RELATIONS[match[0]])
        position = match.end()
    return [side.strip() for side in sides], signs


def _words(text: str) -> str | None:
    r"""Return an answer in words, or a choice, in one form; None if it is neither.

    >>> _words(r"\text{(A)}"), _words("Tuesday"), _words("xy"), _words("x")
    ('A', 'tuesday', None, 'x')
    """
    inner = re.fullmatch(r"\\text\{([^{}\\]+)\}", text)
    plain = inner[1].strip() if inner else text
    choice = re.fullmatch(r"\(?([A-Z])\)?\.?", plain)
    if choice:
        return choice[1]
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9' ,.-]*", plain):
        return None
    if inner or len(plain) == 1 or re.search(r"[A-Za-z]{4}", plain) or plain.lower() in ("no", "yes"):
        return plain if len(plain) == 1 else plain.lower()
    return None


def _split_unit(text: str) -> tuple[str, str]:
    r"""Return the value of a quantity and its unit, which is empty if there is none.

    >>> _split_unit(r"5\text{cm}^2"), _split_unit(r"\$5"), _split_unit(r"90^\circ"), _split_unit("5x")
    (('5', 'cm^2'), ('5', 'dollar'), ('90', 'degree'), ('5x', ''))
    """
    if text.startswith(r"\$"):
        return text[2:], "dollar"
    if text.endswith(r"^\circ") and as_number(text.removesuffix(r"^\circ")) is not None:
        return text.removesuffix(r"^\circ"), "degree"
    match = re.fullmatch(r"(.+)\\text\{([A-Za-z ]{1,40})\}(\^\d)?", text) or re.fullmatch(
        r"([\d.,/+-]*\d) ([A-Za-z ]{1,40}?)(\^\d)?", text
    )
    if match is None:
        match = re.fullmatch(r"(.+\})([a-z]{2,20})(\^\d)?", text)  # what `tidy` makes of 9\sqrt{3} cm^2
        match = match if match and match[2] in UNITS else None
    if match is None:
        return text, ""
    if match[2] == "percent":
        return f"{match[1]}%", ""
    words = match[2].split()
    if len(words) == 1 and words[0] not in UNITS and re.fullmatch(r"[a-z]{3,}s", words[0]):
        return (text, "") if words[0] in NO_UNITS else (match[1], words[0])  # 18 eggs
    if not words or not all(word in UNITS for word in words):
        return text, ""
    if len(match[2]) == 1 and r"\text" not in text:
        return text, ""  # 2 m may as well be a product
    return match[1].strip(), " ".join(UNITS[word] for word in words) + (match[3] or "")


def as_number(text: str) -> Fraction | None:
    r"""Return the exact value of a number that `tidy` has written; None if it is not a number.

    >>> as_number(r"-2\frac{1}{3}"), as_number("1.2e3"), as_number("12.5%"), as_number("x")
    (Fraction(-7, 3), Fraction(1200, 1), Fraction(1, 8), None)
    """
    if len(text) > 200:
        return None
    if text.endswith("%"):
        value = as_number(text[:-1])
        return None if value is None else value / 100
    if match := re.fullmatch(r"([+-]?)(\d+) ?(\d+/\d+|\\frac\{\d+\}\{\d+\})", text):
        if " " not in text and "\\" not in text:
            return _ratio(text)
        part = _ratio(match[3])
        return None if part is None else (int(match[2]) + part) * (-1 if match[1] == "-" else 1)
    if match := re.fullmatch(r"([+-]?[\d.]+)(?:\\times|\\cdot) ?10\^(?:\{([+-]?\d{1,3})\}|(\d))", text):
        value = _decimal(match[1])
        return None if value is None else value * Fraction(10) ** int(match[2] or match[3])
    if match := re.fullmatch(r"([+-]?[\d.]+)[eE]([+-]?\d{1,3})", text):
        value = _decimal(match[1])
        return None if value is None else value * Fraction(10) ** int(match[2])
    if match := re.fullmatch(r"([+-]?)(\d*)\.(\d*)\\overline\{(\d+)\}", text):
        fixed, repeated = match[3], match[4]
        value = _decimal(f"{match[2] or 0}.{fixed}") or Fraction(0)
        value += Fraction(int(repeated), 10 ** len(fixed) * (10 ** len(repeated) - 1))
        return -value if match[1] == "-" else value
    decimal = _decimal(text)
    return _ratio(text) if decimal is None else decimal


def _decimal(text: str) -> Fraction | None:
    return Fraction(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text) else None


def _ratio(text: str) -> Fraction | None:
    match = re.fullmatch(r"([+-]?)\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}", text) or re.fullmatch(
        r"([+-]?)(\d+)/(\d+)", text
    )
    if match is None or int(match[3]) == 0:
        return None
    value = Fraction(int(match[2]), int(match[3]))
    return -value if match[1] == "-" else value


def is_expression(text: str) -> bool:
    r"""Return whether a text that `tidy` has written is an expression that is safe to parse, and small enough.

    >>> [is_expression(text) for text in (r"2\sqrt{2}", "__import__", r"\frac{1}{", "5+", "9^{9^9}", "12_8")]
    [True, False, False, False, False, False]
    """
    position = 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None or (match[1] and match[1] not in COMMANDS):
            return False
        position = match.end()
    return not any(pattern.search(text) for pattern in NO_EXPRESSION)
