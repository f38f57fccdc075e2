"""Draw a figure of the catalog from the committed CSVs, in the style of plainrl/figure_style.py."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.catalog import BASELINE, ENTROPY, GRAD_NORM, LOSS, ON_POLICY
from experiments.curves import Curve, Group, Panel, Series, read_series
from plainrl.figure_style import (
    PANEL_HEIGHT,
    PANEL_WIDTH,
    SEEDS_NOTE,
    describe_axis,
    draw_series,
    keep_possible,
    legend_height,
    new_figure,
    put_legend_below,
)
from plainrl.run_records import EVAL_SCORE

FEWEST_SEEDS = 3
TITLE_HEIGHT, LINE_HEIGHT = 0.35, 0.3  # inches
AXES = {
    "optimizer_steps": "optimizer steps",
    "rollout_batches": "rollout batches",
    "minutes": "minutes of training steps\n(median of the seeds)",
    "sampled_tokens": "sampled tokens (thousands)",
}


class Quantity(NamedTuple):
    """How a metric is shown: the axis label, the possible values, smoothing (1: none), the scale of its axis."""

    label: str
    low: float | None = 0.0
    high: float | None = None
    window: int = 1
    is_logarithmic: bool = False

    def holds(self, value: float) -> bool:
        """Return whether a value lies between the limits."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


SHARE = " (share right)"
QUANTITIES = {
    EVAL_SCORE: Quantity(f"answer reward{SHARE}", high=1.0),
    ENTROPY: Quantity("entropy (nats per token)"),
    LOSS: Quantity("loss (nats per token)", window=5, is_logarithmic=True),  # it falls by a factor of 100
    GRAD_NORM: Quantity("gradient norm", window=5),
    "train/loss_per_pair": Quantity("loss (nats per pair)", window=5),
    "eval/accuracy": Quantity("pairs whose chosen response\nis likelier (share)", high=1.0),
    **{f"eval/{n}/answer_reward": Quantity(f"answer reward, {n} terms", high=1.0) for n in ("four", "five", "six")},
    "eval/response_length": Quantity("response length (tokens)"),
    "rollout/reward": Quantity(f"training reward{SHARE}", high=1.0, window=5),
    "rollout/response_length": Quantity("response length (tokens)", window=5),
}


def draw(groups: Sequence[Group], results: Path, path: Path, suffix: str = "") -> bool:
    """Draw a figure of all curves that have results; return whether there was anything to draw.

    What has no results, or fewer seeds than FEWEST_SEEDS, is printed. A figure whose only results are a borrowed
    baseline is skipped.
    """
    series = {
        (curve, panel): read_series(curve, panel, results, suffix)
        for group in groups
        for panel in group.panels
        for curve in group.curves
    }
    num_seeds: dict[Curve, int] = {}
    for (curve, _), found in series.items():
        num_seeds[curve] = max(len(found.seeds), num_seeds.get(curve, 0))
    missing = [f"{curve.sweep}{suffix} {curve.variant}" for curve, n in num_seeds.items() if n == 0]
    is_skipped = not any(num_seeds[curve] for curve in own_curves(list(num_seeds)))
    if missing:
        print(f"{path}: {'skipped, ' if is_skipped else ''}no results yet of {', '.join(missing)}")
    if is_skipped:
        return False
    for curve, n in num_seeds.items():
        if 0 < n < FEWEST_SEEDS:
            print(f"{path}: {curve.sweep}{suffix} {curve.variant} has {n} of at least {FEWEST_SEEDS} seeds")
    _draw_groups(groups, series, num_seeds, path)
    return True


def own_curves(curves: Sequence[Curve]) -> Sequence[Curve]:
    """Return a figure's curves without the sweep of the baseline and the on-policy run, unless it shows nothing else.

    Other experiments borrow these two.
    """
    on_policy = (ON_POLICY.sweep, ON_POLICY.variant)
    own = [curve for curve in curves if (curve.sweep, curve.variant) != on_policy and curve.sweep != BASELINE.sweep]
    return own or curves


def _draw_groups(
    groups: Sequence[Group],
    series: Mapping[tuple[Curve, Panel], Series],
    num_seeds: Mapping[Curve, int],
    path: Path,
) -> None:
    """Draw the groups below each other: a single group's panels in one column, those of several groups in two."""
    num_columns = 1 if len(groups) == 1 else 2
    width = PANEL_WIDTH * (1 if num_columns == 1 else 1.7)
    heights = [
        TITLE_HEIGHT
        + math.ceil(len(group.panels) / num_columns) * (PANEL_HEIGHT + _extra_height(group.panels))
        + legend_height([_label(curve, num_seeds) for curve in group.curves], width)
        for group in groups
    ]
    with new_figure(path, width, sum(heights)) as figure:
        for subfigure, group in zip(
            figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0], groups, strict=True
        ):
            subfigure.suptitle(group.title)
            num_rows = math.ceil(len(group.panels) / num_columns)
            grid = subfigure.subplots(num_rows, num_columns, squeeze=False)
            for axes, panel in zip(grid.flat, group.panels, strict=True):
                _draw_panel(axes, panel, group, series, num_seeds)
            most = max(grid.flat, key=lambda axes: len(axes.get_legend_handles_labels()[0]))
            put_legend_below(subfigure, most, width, SEEDS_NOTE)


def _extra_height(panels: Sequence[Panel]) -> float:
    """Return the inches that axis labels of two lines add to a row of panels."""
    return LINE_HEIGHT * max(AXES[panel.axis].count("\n") for panel in panels)


def _draw_panel(
    axes: Any,
    panel: Panel,
    group: Group,
    series: Mapping[tuple[Curve, Panel], Series],
    num_seeds: Mapping[Curve, int],
) -> None:
    quantity = QUANTITIES[panel.metric]
    for number, curve in enumerate(group.curves):
        found = series[curve, panel]
        if found.mean:
            draw_series(axes, number, _label(curve, num_seeds), found.seeds, found.mean, quantity.window)
    lines = [line for curve in group.curves for line in (series[curve, panel].mean, *series[curve, panel].seeds)]
    is_possible = all(quantity.holds(value) for line in lines for _, value in line)  # a reward of one's own may be any
    label = quantity.label if is_possible else quantity.label.replace(SHARE, "")
    axes.set(xlabel=AXES[panel.axis], ylabel=describe_axis(label, quantity.window))
    if quantity.is_logarithmic:
        axes.set_yscale("log")
    elif is_possible:
        keep_possible(axes, quantity.low, quantity.high)


def _label(curve: Curve, num_seeds: Mapping[Curve, int]) -> str:
    """Return a curve's name in the legend; one with few seeds says how many."""
    n = num_seeds[curve]
    return f"{curve.short or curve.label}{f' (n = {n})' if 0 < n < FEWEST_SEEDS else ''}"
