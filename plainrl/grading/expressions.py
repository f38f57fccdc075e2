r"""Whether two mathematical expressions have the same value, wherever they have one.

Expressions are evaluated with fixed numbers for their variables (arithmetic.py). Those that agree at all of these
points are equal. A text is read and computed in one pass. This is the grammar, and nothing else is an expression:

    sum      = [sign] product { sign product }
    product  = implicit { (\cdot | \times | * | / | \div) [sign] implicit }
    implicit = power { power }                     factors side by side: 2x, 3\sqrt{2}; a mixed number: 3\frac{1}{2}
    power    = atom [ ! | ^ [sign] atom ] [ ^\circ ]
    atom     = number | variable | constant | ( sum ) | |sum| | \frac{sum}{sum} | \sqrt[sum]{sum} | function | ...
    function = name [_argument] [^exponent] argument

A function takes the bracket that follows, or else the implicit product up to the next function. So \sin 2x \cos x is
the product of two functions, and \ln 2 \cdot 3 is the product of \ln 2 and 3. A slash takes the implicit product that
follows: a/bc is a/(bc). After a number, and before a bracket, it does not: 1/2x is half of x, a/(b)c is a/b times c.
"""

import math
import random
import re
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache

from plainrl.grading.arithmetic import GradingError, NoValueError, Point, Value, are_same, sign, without_noise

SECONDS_PER_ANSWER = 5.0  # of this thread's computing
MAX_KNOWN = 2**16  # results remembered
NUM_WHOLE = 24  # whole numbers that are tried besides, where a floor or ceiling may have steps
SIZES = (1, 30, 3, 1, 1000, 10, 1, 100, 5, 1, 300, 20)  # of the variables at each point
MIN_POINTS = 3  # at which two expressions must have values
MAX_VARIABLES = 40
MAX_DEPTH = 30  # of expressions within expressions
Sides = tuple[str, ...]  # an expression, or the two sides of an equation

NUMBER = r"\d*\.\d*\\overline\{\d{1,50}\}|\d+\.?\d*|\.\d+"
GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi|omega|"
    "Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega|ell"
)
VARIABLE = rf"(?:[A-Za-z]|\\(?:{GREEK})(?![A-Za-z]))(?:_(?:[A-Za-z0-9]|\{{[A-Za-z0-9,]{{1,6}}\}}))?"
TOKEN = re.compile(rf"\s*({NUMBER}|{VARIABLE}|\\[A-Za-z]+|\S)", re.ASCII)
# Words, and derivatives, which are no quotients
UNREADABLE = re.compile(
    r"(?<![\\A-Za-z])(?:[A-Za-z]{4}|d[a-z]?/d ?[a-z])|"
    r"\\frac\{d(?:\^\d)? ?(?:[a-z]|\([^{}]*\))?\}\{d ?[a-z](?:\^\d)?\}"
)
SAME = {r"\cdot": "*", r"\times": "*", r"\div": "/"}
CONSTANTS = {"e": "e", "i": "i", r"\pi": "pi"}
INVERTIBLE = {f"\\{name}" for name in "sin cos tan cot sec csc".split()}
# The operation that each function is
FUNCTIONS = {name: name[1:] for name in (*INVERTIBLE, r"\sinh", r"\cosh", r"\ln", r"\log", r"\exp")}
FUNCTIONS |= {f"\\arc{name[1:]}": f"a{name[1:]}" for name in INVERTIBLE} | {r"\lg": "log"}
BRACKETS = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
BRACKET_OPERATIONS = {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}


def factor_between(one: Sides, other: Sides, deadline: float) -> int:
    r"""Return 1 for equal expressions; for equations the sign of the number by which one is a multiple; else 0.

    Each is the text of an expression, or those of the two sides of an equation or inequality. Real expressions are
    compared where both are real. A GradingError is raised where `time.thread_time()` reaches the deadline, and again
    when the same is asked.

    >>> [factor_between((r"\ln 6",), (text,), 1e9) for text in (r"\ln 2+\ln 3", r"\ln 2\cdot 3")]
    [1, 0]
    >>> factor_between(("5x-7y", "0"), ("14y", "10x"), 1e9), factor_between(("x", "1"), ("x", "2"), 1e9)
    (-1, 0)
    """
    with _lock:
        if len(_known) >= MAX_KNOWN:
            _known.clear()
        if (one, other) not in _known:
            try:
                _known[one, other] = _find_factor(one, other, deadline)
            except (NoValueError, RecursionError, GradingError) as error:  # ln^ln^ln... nests without brackets
                _known[one, other] = str(error) if isinstance(error, GradingError) else 0
        factor = _known[one, other]
    if isinstance(factor, str):
        raise GradingError(factor)
    return factor


@lru_cache(8192)
def constant(*sides: str) -> Value:
    r"""Return the value of a text without variables, or of a left side minus a right side; NaN if there is none.

    >>> [constant(text) for text in (r"-2\frac{1}{3}", "1.25", r"0.\overline{3}", "x")]
    [Fraction(-7, 3), Fraction(5, 4), Fraction(1, 3), nan]
    """
    try:
        with _lock:
            return _evaluate(sides, Point({}))
    except (NoValueError, RecursionError):
        return math.nan


_lock = threading.RLock()  # mpmath's precision is shared; who asks the same at the same time waits for the result
_known: dict[tuple[Sides, Sides], int | str] = {}


def _find_factor(one: Sides, other: Sides, deadline: float) -> int:
    tokens, other_tokens = ({token for side in sides for token in _tokens(side)} for sides in (one, other))
    variables = {token for token in tokens | other_tokens if re.fullmatch(VARIABLE, token) and token not in CONSTANTS}
    factor: Value = Fraction(1) if len(one) == 1 else None
    num_zeros = num_multiples = 0
    for x, y in _common_values(one, other, sorted(variables), deadline):
        if x == y == 0:
            num_zeros += 1
            continue
        ratio, num_multiples = Point({}).compute("/", x, y), num_multiples + 1  # no value if only y is 0
        factor = ratio if factor is None else factor
        if not are_same(ratio, factor):
            return 0
    if len(one) == 1:
        return int(num_zeros + num_multiples >= (MIN_POINTS if variables else 1))
    return sign(factor) if num_multiples >= MIN_POINTS and variables <= tokens & other_tokens else 0


def _common_values(one: Sides, other: Sides, variables: list[str], deadline: float) -> Iterator[tuple[Value, Value]]:
    """Yield the values of two expressions at the points where both are real; at all points if they never are."""
    tokens = {token for text in (*one, *other) for token in _tokens(text)}
    has_steps, are_ever_real, elsewhere = not tokens.isdisjoint((r"\lfloor", r"\lceil")), False, []
    for index in range(len(SIZES) + NUM_WHOLE * has_steps if variables else 1):
        points = [Point(dict(zip(variables, _numbers(index, has_steps), strict=False)), deadline) for _ in range(2)]
        try:
            x, y = _evaluate(one, points[0]), _evaluate(other, points[1])
        except NoValueError:  # a pole, or too large
            continue
        if "i" in tokens or all(point.is_real for point in points):
            are_ever_real = True
            yield x, y
        else:
            elsewhere.append((x, y))
            if (index % 2 or "|" in tokens) and any(point.is_real for point in points):
                raise NoValueError  # real for positive variables; and who writes |x| means negative x too
    yield from () if are_ever_real else elsewhere


@lru_cache(2 * len(SIZES) + NUM_WHOLE)
def _numbers(index: int, has_steps: bool) -> list[Fraction]:
    """Return fixed values for variables: positive ones at every second point, else of both signs.

    Where a floor or ceiling may have steps, some values are whole, and some are halves or thirds. Then follow the whole
    numbers from 1 on: n / 9 has a step at every ninth alone.
    """
    if index >= len(SIZES):
        return [Fraction(index - len(SIZES) + 1 + 7 * place) for place in range(MAX_VARIABLES)]
    generator, signs = random.Random(index), ((1, 1, 1) if index % 2 else (1, -1, (-1) ** (index // 2)))
    sizes = [Fraction(generator.randrange(1, 1000) * SIZES[index], 1009) for _ in range(MAX_VARIABLES)]
    if has_steps and index in (1, 2, 3):
        sizes = [math.ceil(size) - Fraction(index - 1, index) for size in sizes]
    return [signs[(place + index // 2) % 3] * size for place, size in enumerate(sizes)]


def _evaluate(sides: Sides, point: Point) -> Value:
    """Return the value of an expression, or of the left side minus the right side."""
    return without_noise(lambda: point.compute("-", *(_Reader(side, point).value() for side in sides)))


@lru_cache(8192)
def _tokens(text: str) -> tuple[str, ...]:
    if UNREADABLE.search(text):
        raise NoValueError
    return *(SAME.get(token, token) for token in map(str, TOKEN.findall(text))), "", "", ""


class _Reader:
    """Reads an expression from left to right and computes it; raises NoValueError at what is not in the grammar."""

    def __init__(self, text: str, point: Point) -> None:
        self._tokens, self._compute, self._numbers = list(_tokens(text)), point.compute, point.numbers
        self._position = self._depth = 0
        self._in_bars = False

    def value(self) -> Value:
        value = self._sum()
        self._take("")
        return value

    @property
    def _next(self) -> str:
        return self._tokens[self._position]

    def _take(self, expected: str | None = None) -> str:
        if expected not in (None, self._next):
            raise NoValueError
        self._position += 1
        return self._tokens[self._position - 1]

    def _sum(self) -> Value:
        terms = [self._signed(self._product)]
        while self._next in ("+", "-"):
            terms.append(self._signed(self._product))
        return self._compute("+", *terms) if len(terms) > 1 else terms[0]

    def _signed(self, read: Callable[[], Value]) -> Value:
        signs = [self._take() for _ in range(2) if self._next in ("+", "-")]
        return -read() if signs.count("-") == 1 else read()

    def _product(self) -> Value:
        start = self._position
        value = self._implicit()
        while self._next in ("*", "/"):
            is_after_number = self._position == start + 1 and self._tokens[start][-1].isdecimal()
            if self._take() == "*":
                value = self._compute("*", value, self._signed(self._implicit))
                continue
            is_short = self._next in ("(", "[") or (is_after_number and self._next[:1].isdecimal())
            value = self._compute("/", value, self._signed(self._power if is_short else self._implicit))
            if self._starts_factor():
                value = self._compute("*", value, self._implicit())
        return value

    def _implicit(self, before_function: bool = False) -> Value:
        is_whole, value, start = self._next.isdecimal(), self._power(), self._position
        if is_whole and self._next == r"\frac":
            fraction = self._power()
            is_literal = re.fullmatch(r"\\frac[{}0-9]+", "".join(self._tokens[start : self._position]))
            is_mixed = is_literal and (fraction < 1 or not self._starts_factor())
            value = self._compute("+" if is_mixed else "*", value, fraction)
        while self._starts_factor() and not (before_function and self._next in FUNCTIONS):
            before = self._tokens[self._position - 1]
            if re.match("[0-9.]", self._next) and before != "i" and re.match(r"[A-Za-z0-9.}]", before):
                raise NoValueError  # x2 and 2 3 are no products
            value = self._compute("*", value, self._power())
        return value

    def _starts_factor(self) -> bool:
        if self._next == "|":
            return not self._in_bars
        return self._next not in BRACKETS.values() and re.match(r"[A-Za-z0-9.\\(\[{]", self._next) is not None

    def _power(self) -> Value:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise NoValueError
        value, last = self._atom(), ""
        while self._next in ("!", "^"):
            operation = self._take()
            if self._next == r"\circ":
                self._take()
                value = self._compute("*", value, self._compute("pi"), Fraction(1, 180))
            elif last:
                raise NoValueError  # x!! is not (x!)!, x^2! can be read in two ways, and TeX refuses x^2^3
            else:
                exponents = [self._signed(self._atom)] if operation == "^" else []
                value, last = self._compute(operation, value, *exponents), operation
        self._depth -= 1
        return value

    def _atom(self) -> Value:
        token = self._next
        if token in BRACKETS:
            return self._group()
        self._take()
        if re.match(r"\.?[0-9]|\.\\", token):
            return _number(token)
        if token in CONSTANTS:
            return self._compute(CONSTANTS[token])
        if token in ("f", "g", "h") and self._next == "(" and token in self._numbers:
            name = self._numbers[token]  # an unknown function, for which any function of name and argument will do
            return self._compute("*", name, self._compute("sin", self._compute("+", name, self._group())))
        if token in self._numbers:
            return self._numbers[token]
        if token in (r"\frac", r"\binom"):
            return self._compute("/" if token == r"\frac" else "binom", self._argument(), self._argument())
        if token == r"\sqrt":
            degree = self._group() if self._next == "[" else Fraction(2)
            return self._compute("^", self._argument(), self._compute("/", Fraction(1), degree))
        return self._function(token)

    def _function(self, token: str) -> Value:
        if token not in FUNCTIONS:
            raise NoValueError
        base, exponent, operation = Fraction(10), None, FUNCTIONS[token]
        if token == r"\log" and self._next == "_":
            self._take()
            base = self._argument()
        if self._next == "^":
            self._take()
            exponent = self._signed(self._atom)
        if self._next in ("(", "[", "{"):
            argument = self._group()
        elif self._next in FUNCTIONS:
            argument = self._power()
        else:
            argument = self._signed(lambda: self._implicit(before_function=True))
        if token in INVERTIBLE and exponent == -1:
            operation, exponent = f"a{operation}", None
        if operation == "log":
            value = self._compute("/", self._compute("ln", argument), self._compute("ln", base))
        elif operation == "exp":
            value = self._compute("^", self._compute("e"), argument)
        else:
            value = self._compute(operation, argument)
        return value if exponent is None else self._compute("^", value, exponent)

    def _argument(self) -> Value:
        r"""Read what TeX takes as an argument: a group, or one digit, letter or command; also the (2) of sqrt(2)."""
        token = self._next
        if token.isdecimal():
            self._tokens[self._position : self._position + 1] = [*token]
        return self._group() if token in BRACKETS else self._atom()

    def _group(self) -> Value:
        opening, in_bars = self._take(), self._in_bars
        if opening == "|" and in_bars:
            raise NoValueError
        self._in_bars = opening == "|"
        value = self._sum()
        self._take(BRACKETS[opening])
        self._in_bars = in_bars
        return self._compute(BRACKET_OPERATIONS[opening], value) if opening in BRACKET_OPERATIONS else value


def _number(token: str) -> Fraction:
    plain, _, repeated = token.removesuffix("}").partition(r"\overline{")
    unit = Fraction(1, 10 ** len(plain.partition(".")[2]))
    return Fraction(f"0{plain}") + (unit * Fraction(int(repeated), 10 ** len(repeated) - 1) if repeated else 0)
