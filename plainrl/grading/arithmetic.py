"""Arithmetic of an expression: exact where values are rational, else to 120 digits, and never without a limit.

No step can hang: each works on numbers of limited size, and what is larger has no value. Nor has a sum in which a term
is too small beside another to be seen.
"""

import math
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import mpmath

MAX_BITS = 40_000  # of an exact number, and of the exponent of any other
MAX_ARGUMENT = 10**30  # of a function
MAX_FACTORIAL = 2_000
DIGITS = 120
CLOSE = mpmath.mpf(10) ** -100  # relative difference of values that are taken to be equal
TINY = mpmath.mpf(10) ** -40  # a value below may be the noise of an exact zero
NOISE = mpmath.mpf(10) ** -100  # a value below surely is
LOST = mpmath.mpf(10) ** -50  # a term that is smaller beside another does not count in their sum

Value = Any  # a Fraction, or a real or complex number of mpmath
_context: Any = mpmath.MPContext()
_context.dps = DIGITS


class GradingError(Exception):
    """Two expressions could not be compared; the message is the reason, timeout."""


class NoValueError(Exception):
    """A text is no expression, or an expression has no value of a size that is computed."""


@dataclass
class Point:
    """Values of variables. `is_real` tells whether no step from real numbers has led to one that is not real."""

    numbers: dict[str, Fraction]
    deadline: float = math.inf
    is_real: bool = True

    def compute(self, operation: str, *values: Value) -> Value:
        """Return the result of one of `OPERATIONS`; raise NoValueError if there is none, or none within the limits."""
        if time.thread_time() > self.deadline:
            raise GradingError("timeout")
        try:
            value = OPERATIONS[operation](*values)
        except (ArithmeticError, ValueError, TypeError) as error:  # a pole, or no real number where one is needed
            raise NoValueError from error
        if not self.numbers and type(value) is not Fraction and not all(map(_is_short, values)):
            raise NoValueError  # 10^{140}+1 would be rounded to 10^{140}
        if not _is_real(value) and all(map(_is_real, values)):
            self.is_real = False
        return _limited(value)


def are_same(x: Value, y: Value) -> bool:
    """Return whether two values are equal, as far as they are known."""
    if _are_exact(x, y):
        return x == y
    x, y = _inexact(x), _inexact(y)
    return bool(abs(x - y) <= max(abs(x), abs(y)) * CLOSE)


def sign(value: Value) -> int:
    """Return the sign of a real number, 0 for one that is not real, -1 for NaN."""
    return -1 if value != value else int(_context.sign(_context.re(_inexact(value)))) if _is_real(value) else 0


def without_noise(compute: Callable[[], Value]) -> Value:
    """Return a value, and an exact zero for one that shrinks as the precision grows."""
    value = compute()
    if type(value) is not Fraction and abs(value) < TINY:
        with _context.workdps(3 * DIGITS):
            return Fraction(0) if abs(compute()) <= abs(value) * TINY else value
    return value


def _is_real(value: Value) -> bool:
    return type(value) in (Fraction, _context.mpf) or bool(abs(_context.im(value)) <= abs(value) * CLOSE)


def _inexact(value: Value) -> Value:
    return _context.mpf(value.numerator) / value.denominator if type(value) is Fraction else value


def _is_short(value: Value) -> bool:
    """Return whether a number is known to all its digits, but for those of a quotient."""
    parts = value.as_integer_ratio() if type(value) is Fraction else ()
    return all((part // (part & -part or 1)).bit_length() <= _context.prec for part in parts)


def _limited(value: Value) -> Value:
    is_exact = type(value) is Fraction
    size = sum(map(int.bit_length, value.as_integer_ratio())) if is_exact else abs(_context.mag(value or 1))
    if not size <= MAX_BITS:  # the size of what is not finite is infinite, or NaN
        raise NoValueError
    return value


def _are_exact(*values: Value) -> bool:
    return all(type(value) is Fraction for value in values)


def _fold(operate: Callable[[Value, Value], Value], *values: Value) -> Value:
    result, *others = values if _are_exact(*values) else map(_inexact, values)
    for value in others:
        result = _limited(operate(result, value))
    return result


def _add(*values: Value) -> Value:
    if not _are_exact(*values):
        sizes = [abs(_inexact(value)) for value in values]
        small = [pair for pair in zip(sizes, values, strict=True) if 0 < pair[0] < max(sizes) * LOST]
        if any(size > NOISE or type(value) is Fraction for size, value in small):
            raise NoValueError
    return _fold(operator.add, *values)


def _power(base: Value, exponent: Value) -> Value:
    if base == 0:
        return Fraction(0) if sign(exponent) > 0 else _limited(_context.inf)
    is_exact = _are_exact(base, exponent) and exponent.denominator == 1
    bits = max(map(int.bit_length, base.as_integer_ratio())) if is_exact else abs(_context.mag(_inexact(base)))
    if max(bits, 1) * abs(_inexact(exponent)) > MAX_BITS or NOISE < abs(_inexact(exponent)) < TINY:
        raise NoValueError
    if is_exact:
        return base ** int(exponent)
    base = _inexact(base)
    if type(exponent) is Fraction and exponent.denominator % 2 and sign(base) < 0:
        root = _context.power(-base, _inexact(exponent))  # the cube root of -8 is -2
        return -root if exponent.numerator % 2 else root
    return _context.power(base, _inexact(exponent))


def _floor(value: Value) -> Fraction:
    if type(value) is Fraction:
        return Fraction(math.floor(value))
    nearest = _context.nint(value)  # raises an error for complex numbers
    return Fraction(int(nearest if abs(value - nearest) < TINY else _context.floor(value)))


def _factorial(value: Value) -> Value:
    if abs(value) > MAX_FACTORIAL:
        raise NoValueError
    is_whole = type(value) is Fraction and value.denominator == 1 and value >= 0
    return Fraction(math.factorial(int(value))) if is_whole else _context.gamma(_inexact(value) + 1)


def _function(name: str, value: Value) -> Value:
    if abs(value := _inexact(value)) > MAX_ARGUMENT or NOISE < abs(value) < TINY:
        raise NoValueError
    return getattr(_context, name)(value)


OPERATIONS: dict[str, Callable[..., Value]] = {
    "+": _add, "-": lambda x, y=Fraction(0): _add(x, -y), "*": partial(_fold, operator.mul), "!": _factorial,
    "/": partial(_fold, operator.truediv), "^": _power, "ln": lambda x: _context.ln(_inexact(x)), "abs": abs,
    "binom": lambda n, k: _fold(operator.truediv, *map(_factorial, (n, k, _fold(operator.sub, n, k)))),
    "floor": _floor, "ceil": lambda x: -_floor(-x), "pi": lambda: +_context.pi, "e": lambda: +_context.e,
    **{n: partial(_function, n) for n in "sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh".split()},
    "i": lambda: _context.mpc(0, 1),
}  # fmt: skip
