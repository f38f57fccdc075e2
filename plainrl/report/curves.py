"""The axes of a run's metrics, and the panels that show them in training.png and report.html.

Both show the metrics by the same steps: optimizer steps in SFT, rollout batches in GRPO and expert iteration. A batch
of K optimizer steps has the k-th of them at (b - 1) + k / K, for batch b = 1, 2, ...
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plainrl.clock import OF_ALL_EVALUATIONS
from plainrl.run_records import Line, plot_metrics, read_metrics

SMOOTHED_FROM = 60  # a line of more points is smoothed in the figure, over a twentieth of them
Row = Mapping[str, Any]


class Panel(NamedTuple):
    """A quantity with its unit, and the metrics that measure it: metric -> label."""

    title: str
    metrics: Mapping[str, str]
    low: float | None = 0.0  # the axis begins here; None: where the values do
    in_figure: bool = True  # else it is in report.html alone


PANELS = (
    Panel(
        "reward (share)",
        {
            "eval/answer_reward": "validation, answer",
            "rollout/reward": "training",
            "eval/format_reward": "validation, format",
        },
    ),
    Panel("loss (nats per token)", {"train/loss_per_token": "training"}),
    Panel("preference loss (nats per pair)", {"train/loss_per_pair": "training", "eval/loss": "held out"}),
    Panel(
        "preference pairs (share)",
        {
            "eval/accuracy": "held out, chosen is likelier",
            "eval/reward_accuracy": "held out, chosen has the higher reward",
            "train/reward_accuracy": "training, chosen has the higher reward",
        },
    ),
    Panel(
        "implicit reward (beta times nats)",
        {
            "eval/chosen_reward": "held out, chosen",
            "eval/rejected_reward": "held out, rejected",
            "train/margin": "training, chosen minus rejected",
        },
        low=None,
    ),
    Panel("response length (tokens)", {"eval/response_length": "validation", "rollout/response_length": "training"}),
    Panel("entropy (nats per token)", {"eval/token_entropy": "validation", "train/token_entropy": "training"}),
    Panel("gradient norm", {"train/grad_norm": "before clipping"}),
    Panel(
        "engine against policy (factor)",
        {
            "rollout/log_prob_gap_multiplicative": "training",
            "rollout/sync_multiplicative_error": "training, probes",
            "eval/sync_multiplicative_error": "validation, probes",
        },
        low=None,
        in_figure=False,
    ),
    Panel(
        "responses (share)",
        {
            "eval/truncated_fraction": "validation, cut",
            "rollout/truncated_fraction": "training, cut",
            "rollout/zero_advantage_fraction": "training, advantage zero",
        },
        in_figure=False,
    ),
)


def with_axes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl with `step` and `minutes`: where they stand on the two axes.

    Minutes are those of training steps and evaluations so far, as logged, without loading and saving.

    >>> rows = [{"eval_step": 0, "eval/seconds": 30.0}, {"train_step": 1}, {"train_step": 2, "time/step": 60.0}]
    >>> [(row["step"], row["minutes"]) for row in with_axes(rows)]
    [(0, 0.5), (0.5, 1.0), (1, 1.5)]
    """
    placed: list[dict[str, Any]] = []
    batch: list[Row] = []
    step, seconds = 0, 0.0
    for row in [*rows, {}]:
        is_evaluation = row.get("eval_step") is not None
        if row and not is_evaluation:
            batch.append(row)
        if batch and (is_evaluation or not row or row.get("time/step") is not None):
            taken = float(batch[-1].get("time/step") or 0.0)
            for number, member in enumerate(batch, start=1):
                share = number / len(batch)
                place = step + (1 if share == 1 else round(share, 6))
                placed.append({**member, "step": place, "minutes": round((seconds + taken * share) / 60, 4)})
            step, seconds, batch = step + 1, seconds + taken, []
        if is_evaluation:
            seconds += sum(float(row.get(name) or 0.0) for name in OF_ALL_EVALUATIONS)
            step = row["eval_step"]
            placed.append({**row, "step": step, "minutes": round(seconds / 60, 4)})
    return placed


def lines_of(panel: Panel, names: Sequence[str]) -> dict[str, str]:
    """Return the metrics of a panel that a run logged, with their labels.

    With several validation sets each has its own metrics, such as `eval/gsm8k/answer_reward`.

    >>> lines_of(PANELS[0], ["eval/answer_reward", "eval/gsm8k/answer_reward", "time/step"])
    {'eval/answer_reward': 'validation, answer', 'eval/gsm8k/answer_reward': 'validation, answer, gsm8k'}
    """
    found = {}
    for metric, label in panel.metrics.items():
        prefix, _, rest = metric.partition("/")
        for name in names:
            of_set = re.fullmatch(rf"{re.escape(prefix)}/(.+)/{re.escape(rest)}", name)
            if name == metric or of_set:
                found[name] = f"{label}, {of_set[1]}" if of_set else label
    return found


def step_name(rows: Sequence[Row]) -> str:
    """Return what the steps of a run are."""
    return "rollout batches" if any("rollout/reward" in row for row in rows) else "optimizer steps"


def names_in(rows: Sequence[Row]) -> list[str]:
    """Return the metrics that have a value in some row, in the order in which they were first logged."""
    return list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))


def draw_training_figure(folder: Path) -> Path:
    """Draw a run's training.png anew, from its metrics.jsonl; return its path."""
    rows, path = with_axes(read_metrics(folder)), folder / "training.png"
    names = names_in(rows)
    panels = {}
    for panel in PANELS:
        lines = [Line(rows, "step", name, label) for name, label in lines_of(panel, names).items()]
        window = max([len(line.points) // 20 for line in lines if len(line.points) > SMOOTHED_FROM], default=1)
        if lines and panel.in_figure:
            panels[panel.title] = [
                line._replace(window=window if len(line.points) > SMOOTHED_FROM else 1) for line in lines
            ]
    if any(len(line.points) > 1 for lines in panels.values() for line in lines):  # not before the first step
        plot_metrics(panels, path, step_name(rows))
    return path
