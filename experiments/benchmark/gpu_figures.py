"""The CSV file of `benchmark gpu`: one figure a line, some of them text, and how a person reads them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.benchmark.figures import unit_of

ENVIRONMENT, SETTINGS = "environment", "settings"  # parts that are not measured


class Measured(NamedTuple):
    """The figures of one part of a step. The end of a figure's name tells its unit: see figures.UNITS."""

    part: str
    setting: str  # tells apart what is measured more than once
    figures: dict[str, Any]


class Figure(NamedTuple):
    """One line of the CSV file."""

    card: str
    part: str
    setting: str
    figure: str
    unit: str
    value: str


def as_text(name: str, value: Any) -> tuple[str, str]:
    """Return unit and value of a figure. What is no measured number has no unit.

    >>> as_text("peak_gib", 30.195215), as_text("shape", "tiny"), as_text("vllm", None), as_text("group_size", 8)
    (('GiB', '30.1952'), ('', 'tiny'), ('', 'absent'), ('', '8'))
    """
    if isinstance(value, float):
        return unit_of(name), f"{value:.6g}"
    return "", "absent" if value is None else str(value)


def in_words(figures: Mapping[str, Any]) -> str:
    """Return figures in one line.

    >>> in_words({"seconds": 3.7216, "tokens_per_second": 22701.7, "mfu": 0.209, "sft_batch_size": 128})
    'seconds 3.72, tokens_per_second 22,702, mfu 0.209, sft_batch_size 128'
    """
    return ", ".join(f"{name} {short(value) if isinstance(value, float) else value}" for name, value in figures.items())


def short(value: float) -> str:
    """Return a number with three digits, or all those before the point.

    >>> short(0.20912), short(22701.7)
    ('0.209', '22,702')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
