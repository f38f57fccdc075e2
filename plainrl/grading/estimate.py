r"""Telling expressions apart by their values in floating point, before sympy is asked.

Most wrong answers are far from right. That $2\sqrt{3}$ is not $3\sqrt{2}$ takes no computer algebra to see. Each
expression is evaluated once, with fixed positive numbers for its variables. Every value carries a first-order bound on
its error. Two values that are further apart than a thousand such bounds belong to different expressions.

Nothing else is concluded: values that are close say nothing. Nor does this module evaluate functions, complex values
or what can be read in two ways, such as 1/2x and 3(4).
"""

import math
import re

# A value and a bound on its error
Value = tuple[float, float]

EPSILON = 2.0**-52
SAFETY = 1000.0  # the factor on the bounds; a value less than this many times its error is given up
TINY, HUGE = 1e-200, 1e200  # values outside are too near underflow and overflow
TOKEN = re.compile(r"\\(?:frac|sqrt|pi|cdot|times)(?![A-Za-z])|\d+(?:\.\d+)?|\.\d+|[A-Za-z]|[-+*/^(){}]")
# Their values are algebraically unrelated. Left out are i, and what math-verify's parser may read otherwise: d f g I T
NAMES = "abchjklmnopqrstuvwxyzABCDEFGHJKLMNOPQRSUVWXYZ"
CONSTANTS = {r"\pi": (math.pi, math.pi * EPSILON), "e": (math.e, math.e * EPSILON)}
CONSTANTS |= {name: (1 + math.log(index + 2), 0.0) for index, name in enumerate(NAMES)}


class UnknownError(Exception):
    """An expression has no value here, or none that is precise enough."""


def surely_different(one: str, other: str) -> bool:
    r"""Return whether two expressions surely have different values.

    Args:
        one: an expression as `tidy` writes it (equality.py).
        other: likewise.

    Returns:
        True if they differ. False says nothing.

    >>> surely_different(r"2\sqrt{3}", r"3\sqrt{2}"), surely_different(r"2\sqrt{2}", r"\sqrt{8}")
    (True, False)
    """
    try:
        x, x_error = _Reader(one).read()
        y, y_error = _Reader(other).read()
    except (UnknownError, ArithmeticError):
        return False
    return abs(x - y) > SAFETY * (x_error + y_error)


class _Reader:
    """Evaluates an expression from left to right; raises UnknownError where it could be read in another way."""

    def __init__(self, text: str) -> None:
        self._tokens = TOKEN.findall(text)
        if sum(map(len, self._tokens)) != len(text):
            raise UnknownError
        self._tokens.append("")
        self._position = 0

    def read(self) -> Value:
        value = self._sum()
        self._expect("")
        return value

    def _sum(self) -> Value:
        sign = self._take("-") or self._take("+")
        value, error = self._product()
        if sign == "-":
            value = -value
        while sign := self._take("+") or self._take("-"):
            term, term_error = self._product()
            value, error = _rounded(value + term if sign == "+" else value - term, error + term_error)
        return value, error

    def _product(self) -> Value:
        (value, error), is_divided = self._power(), False
        while True:
            previous, token = self._tokens[self._position - 1], self._tokens[self._position]
            if token == "/":
                self._position, is_divided = self._position + 1, True
                value, error = _quotient((value, error), self._power())
                continue
            if token in (r"\cdot", r"\times", "*"):
                self._position += 1
            elif token in ("", "+", "-", ")", "}"):
                return value, error
            elif (
                is_divided  # 1/2x
                or token[-1].isdigit()  # (2)3, x2
                or (token == r"\frac" and previous[-1] in "0123456789)")  # a mixed number
                or (token == "(" and previous != "}" and previous != ")")  # f(x), 3(4)
            ):
                raise UnknownError
            factor, factor_error = self._power()
            value, error = _rounded(value * factor, abs(value) * factor_error + abs(factor) * error)

    def _power(self) -> Value:
        base = self._factor()
        if not self._take("^"):
            return base
        if self._tokens[self._position] == "{":
            exponent = self._group("{", "}")
        elif len(self._tokens[self._position]) == 1:  # x^12 may mean x^1 2
            exponent = self._factor()
        else:
            raise UnknownError
        if self._tokens[self._position] == "^":
            raise UnknownError
        return _power(base, exponent)

    def _factor(self) -> Value:
        token = self._tokens[self._position]
        if token == "(":
            return self._group("(", ")")
        self._position += 1
        if token in CONSTANTS:
            return CONSTANTS[token]
        if token == r"\sqrt":
            return _power(self._group("{", "}"), (0.5, 0.0))
        if token == r"\frac":
            return _quotient(self._group("{", "}"), self._group("{", "}"))
        if not token[-1:].isdigit():
            raise UnknownError
        value = float(token)
        return value, 0.0 if len(token) < 16 and value.is_integer() else value * EPSILON

    def _group(self, opening: str, closing: str) -> Value:
        self._expect(opening)
        value = self._sum()
        self._expect(closing)
        return value

    def _take(self, token: str) -> str:
        if self._tokens[self._position] != token:
            return ""
        self._position += 1
        return token

    def _expect(self, token: str) -> None:
        if self._tokens[self._position] != token:
            raise UnknownError
        self._position += 1


def _rounded(value: float, error: float) -> Value:
    if not (TINY < abs(value) < HUGE and SAFETY * error < abs(value)):
        raise UnknownError
    return value, error + abs(value) * EPSILON


def _quotient(a: Value, b: Value) -> Value:
    value = a[0] / b[0]
    return _rounded(value, (a[1] + abs(value) * b[1]) / abs(b[0]))


def _power(base: Value, exponent: Value) -> Value:
    (a, a_error), (b, b_error) = base, exponent
    if a == 0 or (a < 0 and not (b_error == 0 and b.is_integer())):
        raise UnknownError  # the value is complex or undefined
    value = a**b
    return _rounded(value, abs(value) * (abs(b) * a_error / abs(a) + abs(math.log(abs(a))) * b_error))
