"""The measured figures: one row each in benchmark.csv, and their summary over the pairs."""

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

SCALED = ("logprob",)  # here the other sides are ours too, with more to do
UNITS = {  # by how a figure's name ends; 1: none
    "tokens_per_second": "tokens/s",
    "responses_per_second": "responses/s",
    "tflop_per_second": "TFLOP/s",
    "tflop": "TFLOP",
    "seconds": "s",
    "gib": "GiB",
    "": "1",
}


class Row(NamedTuple):
    """One measured figure."""

    benchmark: str
    side: str
    pair: int
    figure: str
    unit: str
    value: float


class Summary(NamedTuple):
    """Minimum, median and maximum of a figure over the pairs, and of a ratio.

    The ratio is ours / this side; in SCALED it is this side / ours.
    """

    benchmark: str
    figure: str
    unit: str
    side: str
    spread: tuple[float, float, float]
    ratio: tuple[float, float, float] | None


def unit_of(figure: str) -> str:
    """Return the unit of a figure, which the end of its name tells.

    >>> unit_of("peak_memory_gib"), unit_of("mfu")
    ('GiB', '1')
    """
    return next(unit for ending, unit in UNITS.items() if figure.endswith(ending))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write figures as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows([*row[:-1], f"{row.value:.6g}"] for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Return the figures in a CSV file."""
    with path.open(newline="") as file:
        return [Row(r[0], r[1], int(r[2]), r[3], r[4], float(r[5])) for r in list(csv.reader(file))[1:]]


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Return minimum, median and maximum of each figure of each side, and of the ratios pair by pair."""
    values: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        values.setdefault((row.benchmark, row.figure, row.side), {})[row.pair] = row.value
    summaries = []
    for (benchmark, figure, side), pairs in values.items():
        ours = values.get((benchmark, figure, "ours"), {})
        shared = [pair for pair in pairs if side != "ours" and ours.get(pair) and pairs[pair]]
        ratios = [pairs[p] / ours[p] if benchmark in SCALED else ours[p] / pairs[p] for p in shared]
        ratio = spread(ratios) if ratios else None
        summaries.append(Summary(benchmark, figure, unit_of(figure), side, spread(pairs.values()), ratio))
    return summaries


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Return minimum, median, maximum."""
    values = list(values)
    return min(values), statistics.median(values), max(values)
