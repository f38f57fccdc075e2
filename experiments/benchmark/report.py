"""The figures as a Markdown table and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark.figures import Row, Summary, summarize
from experiments.benchmark.trl_task import TRL_CHECKPOINTING
from experiments.benchmark.turns import PHASES, TURNS
from plainrl.figure_style import COLORS, PANEL_HEIGHT, PANEL_WIDTH, new_figure, put_legend_above

SFT_RATE = ("sft", "tokens_per_second")
SIDE_NAMES = {"ours": "plainrl", "trl": "TRL", TRL_CHECKPOINTING: "TRL, check-\npointing"}
SHORTEST_PHASE = 0.1  # seconds; a shorter one cannot be seen
Medians = Mapping[tuple[str, str, str], float]


def table(summaries: Sequence[Summary]) -> list[str]:
    """Return the lines of a Markdown table, with the sides of a figure next to each other."""
    lines = [
        "| benchmark | figure | unit | side | minimum | median | maximum | ratio: minimum, median, maximum |",
        "|---|---|---|---|---|---|---|---|",
    ]
    figures = list(dict.fromkeys((summary.benchmark, summary.figure) for summary in summaries))
    for row in sorted(summaries, key=lambda row: figures.index((row.benchmark, row.figure))):
        ratio = ", ".join(f"{value:.3g}" for value in row.ratio or ())
        numbers = " | ".join(f"{value:.4g}" for value in row.spread)
        lines.append(f"| {row.benchmark} | {row.figure} | {row.unit} | {row.side} | {numbers} | {ratio} |")
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the medians: the phases of a GRPO step, and SFT's tokens per second. What was not measured is left out."""
    medians = {(row.benchmark, row.figure, row.side): row.spread[1] for row in summarize(rows)}
    drawings = {"grpo": _draw_steps, "sft": _draw_tokens}
    measured = [name for name in drawings if any(row.benchmark == name for row in rows)]
    if not measured:
        return
    with new_figure(path, PANEL_WIDTH, PANEL_HEIGHT * len(measured)) as figure:
        for axes, name in zip(figure.subplots(len(measured), 1, squeeze=False)[:, 0], measured, strict=True):
            drawings[name](axes, medians)


def _draw_steps(axes: Any, medians: Medians) -> None:
    """Draw a GRPO step of each side as one bar, divided into its phases."""
    sides = [side for side in TURNS["grpo"] if any(key[0] == "grpo" and key[2] == side for key in medians)]
    ends = dict.fromkeys(sides, 0.0)
    for number, phase in enumerate(PHASES):
        seconds = [medians.get(("grpo", f"{phase}_seconds", side), 0.0) for side in sides]
        if max(seconds, default=0.0) >= SHORTEST_PHASE:
            label = phase.replace("_", " ")
            names = [SIDE_NAMES[side] for side in sides]
            axes.barh(names, seconds, left=list(ends.values()), label=label, color=COLORS[number], height=0.55)
        ends = {side: ends[side] + value for side, value in zip(sides, seconds, strict=True)}
    for side, total in ends.items():
        axes.text(total, SIDE_NAMES[side], f" {total:.0f} s", va="center")
    axes.set_title("One GRPO step", fontweight="bold")
    axes.set(xlabel="seconds (median)", xlim=(0, 1.18 * max(ends.values(), default=1.0)))
    _finish(axes)
    put_legend_above(axes)


def _draw_tokens(axes: Any, medians: Medians) -> None:
    """Draw SFT's rate of each side as one bar."""
    rates = {side: rate for (name, figure, side), rate in medians.items() if (name, figure) == SFT_RATE}
    labels = [SIDE_NAMES[side] for side in rates]
    axes.barh(labels, list(rates.values()), color=COLORS[5], height=0.55)
    for label, rate in zip(labels, rates.values(), strict=True):
        axes.text(rate, label, f" {rate:.0f}", va="center")
    axes.set_title("SFT", fontweight="bold")
    axes.set(xlabel="tokens of the examples per second (median)", xlim=(0, 1.18 * max(rates.values())))
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.invert_yaxis()  # the first side on top
    axes.grid(visible=False, axis="y")
