"""What a figure shows, and how it is read from the committed CSVs of a sweep (sweep_results.py).

Curve    a variant of a sweep
Panel    a metric over an axis
Group    panels that show the same curves
Series   the points of one curve in one panel: of each seed, and their mean
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.sweep_results import read_table


class Curve(NamedTuple):
    """A variant of a sweep; `label` is its name in tables, `short` the one in figures, if it differs."""

    sweep: str
    variant: str
    label: str
    short: str = ""


class Panel(NamedTuple):
    """A metric over an axis.

    optimizer_steps: whatever the metric was logged by.
    rollout_batches: the same for evaluations; else the number of rollout batches so far.
    minutes: of the training steps so far, without evaluations; the median over the seeds, for a seed's machine may
        have been busy.
    sampled_tokens: thousands sampled in training so far; a curve that samples nothing is left out.
    """

    axis: Literal["optimizer_steps", "rollout_batches", "minutes", "sampled_tokens"]
    metric: str


class Group(NamedTuple):
    """Panels that show the same curves, below one title and above one legend."""

    title: str
    curves: Sequence[Curve]
    panels: Sequence[Panel]


class Series(NamedTuple):
    """Points (x, y) of a curve: those of each seed, and their mean at the steps that all seeds have."""

    seeds: list[list[tuple[float, float]]]
    mean: list[tuple[float, float]]


def read_series(curve: Curve, panel: Panel, results: Path, suffix: str = "") -> Series:
    """Return the points of a curve in a panel, none if there are no results.

    The mean's y is the mean over the seeds, its x their median. Only times and numbers of tokens differ between seeds.
    Times are shown at the median for each seed too.

    Args:
        curve: the variant.
        panel: axis and metric.
        results: the folder with the folders of the sweeps.
        suffix: what follows the sweep's name in its folder, such as -one-gpu.
    """
    rows, runs = (rows_of(curve, results, suffix, name) for name in ("metrics.csv", "runs.csv"))
    by_seed = [points_by_step([row for row in rows if row["seed"] == run["seed"]], panel, run) for run in runs]
    by_seed = [points for points in by_seed if points]
    shared = [step for step in by_seed[0] if all(step in points for points in by_seed)] if by_seed else []
    mean = []
    for step in shared:
        xs, ys = zip(*(points[step] for points in by_seed), strict=True)
        mean.append((statistics.median(xs), statistics.fmean(ys)))
    seeds = [list(points.values()) for points in by_seed]
    if panel.axis == "minutes":
        seeds = [[(x, points[step][1]) for step, (x, _) in zip(shared, mean, strict=True)] for points in by_seed]
    return Series(seeds, mean)


def rows_of(curve: Curve, results: Path, suffix: str, name: str) -> list[dict[str, str]]:
    """Return a curve's rows of its sweep's runs.csv or metrics.csv."""
    return [row for row in read_table(results / f"{curve.sweep}{suffix}" / name) if row["variant"] == curve.variant]


def points_by_step(
    rows: Sequence[Mapping[str, str]], panel: Panel, run: Mapping[str, str]
) -> dict[int, tuple[float, float]]:
    """Return x and y of one run's metric by step.

    Args:
        rows: of metrics.csv, in the order in which they were logged.
        panel: axis and metric.
        run: the row of runs.csv. The tokens sampled so far are its total times the share of them so far.
    """
    # Where the tokens of a step were not logged, its mean length stands for them: every batch was of one size then.
    sizes = [float(row.get("rollout/num_sampled_tokens") or row["rollout/response_length"] or 0) for row in rows]
    if panel.axis == "sampled_tokens" and not sum(sizes):
        return {}
    points, minutes, size, batches = {}, 0.0, 0.0, 0
    for row, of_step in zip(rows, sizes, strict=True):
        minutes += float(row["time/step"] or 0) / 60
        size += of_step
        batches += bool(row.get("rollout/reward"))  # one row for each batch, though it may have several updates
        if row.get(panel.metric):  # only a sweep with further validation sets has columns of theirs
            step = int(row["eval_step"] or row["train_step"])
            thousands = size * float(run["sampled_tokens"] or 0) / (sum(sizes) or 1) / 1000
            of_axis = {"minutes": minutes, "sampled_tokens": thousands}
            of_axis |= {} if row["eval_step"] else {"rollout_batches": batches}
            x = of_axis.get(panel.axis, step)
            points[step] = (x, float(row[panel.metric]))
    return points
