"""One style for all figures: colors, sizes, lines of several seeds, smoothing, legends.

Colors: Okabe and Ito, "Color Universal Design", 2008; color-blind readers can tell them apart. Each series has a
marker of its own besides. Sizes: a figure of one column, shown 360 pixels wide, has text of 11 pixels or more.

Several seeds: each seed is a thin line, their mean a thick one. There are no bands: with three seeds an interval often
leaves the possible values. Smoothed values: the raw ones are faint, and the axis label states the window.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PANEL_WIDTH, PANEL_HEIGHT, LEGEND_LINE = 5.4, 3.2, 0.27  # inches
CHARACTER_WIDTH, HANDLE_WIDTH = 0.09, 0.75  # inches, of a legend's text and of the line before it
MOST_MARKERS = 30  # a line of more points has no markers
MOST_TICKS = 5  # intervals between the ticks of an axis
SEEDS_NOTE = "thin: each seed; thick: the mean of the seeds"
STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.labelsize": 13,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12.5,
    "legend.title_fontsize": 11.5,
    "legend.frameon": False,
    "legend.handlelength": 2.0,
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.6,
    "lines.markersize": 6,
}
Points = Sequence[tuple[float, float]]


@contextmanager
def new_figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """Lend an empty figure in this style; write it to a PNG file at the end.

    Args:
        path: the file; its folder is made if it does not exist.
        width: in inches; PANEL_WIDTH for one column.
        height: in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.draw_without_rendering()  # the layout of subfigures settles in the second pass
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def draw_series(
    axes: "Axes", number: int, label: str, runs: Sequence[Points], mean: Points | None = None, window: int = 1
) -> None:
    """Draw a series: each run as a thin line, their mean as a thick one.

    Args:
        axes: the panel.
        number: 0, 1, ... within the panel; chooses color and marker.
        label: its name in the legend.
        runs: the points (x, y) of each run.
        mean: the points of the thick line; may be left out if there is one run.
        window: how many values the thick line averages; see `smooth`.
    """
    color = COLORS[number % len(COLORS)]
    thick = runs[0] if mean is None else mean
    is_smoothed = window > 1
    for points in runs if is_smoothed or len(runs) > 1 else ():
        axes.plot(*_split(points), color=color, linewidth=1, alpha=0.25 if is_smoothed else 0.55, zorder=2)
    x, y = _split(thick)
    marker = MARKERS[number % len(MARKERS)] if not is_smoothed and len(thick) < MOST_MARKERS else None
    axes.plot(x, smooth(y, window), color=color, marker=marker, label=label, zorder=4 - number / 100)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return at each place the mean of the last `window` values; of all so far where there are fewer.

    >>> smooth([4.0, 2.0, 0.0, 1.0], window=2)
    [4.0, 3.0, 1.0, 0.5]
    """
    sums = [0.0, *itertools.accumulate(values)]  # of all before each place
    starts = [max(0, end - window) for end in range(1, len(values) + 1)]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]


def describe_axis(quantity: str, window: int = 1) -> str:
    """Return an axis label; a smoothed quantity states its window.

    >>> describe_axis("loss (nats per token)", window=5)
    'loss (nats per token)\\nmean of the last 5 steps'
    """
    return f"{quantity}\nmean of the last {window} steps" if window > 1 else quantity


def keep_possible(axes: "Axes", low: float | None, high: float | None) -> None:
    """Let a linear vertical axis end at the smallest and the largest possible value, with a margin for the markers."""
    bottom, top = axes.get_ylim()
    if low is not None:
        bottom = max(bottom, low - 0.02 * (top - low))
    if high is not None:
        top = min(top, high + 0.02 * (high - bottom))
    axes.set_ylim(bottom, top)
    axes.locator_params(axis="y", nbins=MOST_TICKS)


def put_legend_below(figure: "FigureBase", axes: "Axes", width: float, note: str = "") -> None:
    """Put the legend of one panel below all panels of a figure or subfigure, where it covers no line.

    Args:
        figure: what the legend stands at the bottom of.
        axes: the panel whose lines it names.
        width: of the figure, in inches.
        note: a small line above the names, such as SEEDS_NOTE.
    """
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        num_columns = num_legend_columns(labels, width)
        figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, title=note or None)


def put_legend_above(axes: "Axes") -> None:
    """Put a panel's legend in one line between its title and its lines; for a few short names."""
    names = axes.get_legend_handles_labels()[1]
    if names:
        num_columns = num_legend_columns(names, PANEL_WIDTH)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=num_columns, columnspacing=1.2)
        axes.set_title(axes.get_title(), fontweight="bold", pad=30)


def num_legend_columns(labels: Sequence[str], width: float) -> int:
    """Return how many of a legend's labels fit beside each other into a width in inches."""
    longest = max(len(label) for label in labels)
    return max(1, min(len(labels), int(width / (CHARACTER_WIDTH * longest + HANDLE_WIDTH))))


def legend_height(labels: Sequence[str], width: float) -> float:
    """Return the height in inches that a legend with a note needs below the panels."""
    num_lines = 1 + math.ceil(len(labels) / num_legend_columns(labels, width))
    return LEGEND_LINE * num_lines


def _split(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
