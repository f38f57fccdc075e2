"""One run's folder: create or resume it, lock it, log, save checkpoints, finish.

runs/<name>/  config.yaml       resolved configuration
              environment*.json versions, git commit and diff, hardware, command line; one more file for each resumption
              metrics.jsonl     one JSON object per logged step, in order of time
              samples/          graded responses: those of each evaluation, and the first groups of each rollout batch
              checkpoints/      step_*/: the complete state of the run, see plainrl/checkpoint.py
              final/            the trained policy: model and tokenizer, Transformers format
              *.png             figures, drawn from metrics.jsonl
              report.html       a page with curves and responses, see plainrl/report/
              lock              held by the process that writes to the folder
"""

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Self

import yaml

from plainrl.changes import changes_since, require_same_start
from plainrl.checkpoint import (
    TrainingState,
    discard_after,
    flush_to_disk,
    remove_checkpoint,
    remove_leftovers,
    restore,
    write_checkpoint,
    write_durably,
)
from plainrl.checkpoint_files import REMOVED, list_checkpoints, newest_whole_checkpoint, read_record, step_of
from plainrl.cli import read_yaml
from plainrl.clock import Used
from plainrl.config import RunConfig
from plainrl.distributed import on_first, rank, together
from plainrl.faults import describe_end, is_disk_full
from plainrl.folder_lock import holder_of, lock_folder, new_folder
from plainrl.guard import watched
from plainrl.records import UserError, first_line
from plainrl.report.renew import renew_page, show_evaluation
from plainrl.run_records import (
    Metrics,
    describe_environment,
    is_evaluated,
    json_number,
    make_samples_table,
    read_json_object,
    read_metrics,
    set_damaged_lines_aside,
    start_wandb,
)

FINISHED = "finished"
EVALUATION = "evaluation"  # the script whose runs train no policy, so that they leave no final/
BEFORE_CONFIGURATION = {  # what a process may leave if it is killed while it makes a run's folder
    "lock",
    "samples",
    "environment.json",
    ".environment.json.unfinished",
    ".config.yaml.unfinished",
}
PHASE_LIMITS = {
    "sync": "max_rollout_seconds",
    "rollout": "max_rollout_seconds",
    "grade": "max_grade_seconds",
    "old_log_probs": "max_train_seconds",
    "train": "max_train_seconds",
    "evaluate": "max_evaluate_seconds",
    "save": "max_save_seconds",
}


class RunFolder:
    """The folder of one run, and the only place that writes metrics. Use it in a `with` statement.

    Of several ranks the first opens, locks and writes it. The others know where it is, and have no lock.

    A resumed run goes on from `checkpoint`. In a new run it is None.
    """

    def __init__(self, path: Path, config: RunConfig, lock: IO[str] | None) -> None:
        self.path, self.config, self._lock = path, config, lock
        self.checkpoint: Path | None = None
        self._resumption: Mapping[str, Any] | None = None
        self._train_step = 0
        self._used: Used | None = None
        self._wandb_run: Any = None
        self._wandb_run_id: str | None = None

    @classmethod
    def open(cls, config: RunConfig, script: str) -> Self:
        """Return the folder that `config.resume` names, or a new one if that is empty."""
        folder = getattr(config, "resume", "")
        run = cls._for_all(lambda: cls._take_up(Path(folder), config, script) if folder else cls._make(config, script))
        if folder:
            run._find_checkpoint()
        print(f"run folder: {run.path}")
        return run

    @classmethod
    def _for_all(cls, open_it: Callable[[], Self]) -> Self:
        """Let the first rank open the folder, and tell the others which it is.

        Raises:
            UserError: the first rank could not open it, or another does not see it.
        """
        opened: Self | None = None

        def take() -> tuple[Path, RunConfig, str]:
            nonlocal opened
            opened = open_it()
            return opened.path, opened.config, holder_of(opened.path)

        path, config, holder = on_first(take)

        def look() -> None:
            if holder_of(path) != holder:  # there may be an older folder of that name
                raise UserError(
                    f"runs_dir = {config.runs_dir}: rank {rank()} on {platform.node()} does not see {path}, which the "
                    "first rank made; name a folder that all nodes share"
                )

        together(look)
        return opened or cls(path, config, None)

    @classmethod
    def create(cls, config: RunConfig, script: str) -> Self:
        """Return a new folder `runs_dir/run_name`, with configuration and environment recorded; see `open`."""
        return cls._for_all(lambda: cls._make(config, script))

    @classmethod
    def _make(cls, config: RunConfig, script: str) -> Self:
        """Make a new folder.

        If run_name is empty, the folder is that of `new_folder`.

        Raises:
            UserError: the folder is not empty, or it cannot be made.
        """
        path = Path(config.runs_dir) / config.run_name
        try:
            path = path if config.run_name else new_folder(path, script)
            path.mkdir(parents=True, exist_ok=True)
            if any(file.name not in BEFORE_CONFIGURATION for file in path.iterdir()):
                go_on = "" if script == EVALUATION else f"go on with it by resume={path}, "  # that cannot be resumed
                raise UserError(
                    f"run_name = {path.name}: {path} exists already; {go_on}give another run_name, or remove it"
                )
            resolved = config.model_copy(update={"run_name": path.name})
            lock = lock_folder(path)
            (path / "samples").mkdir(exist_ok=True)
            write_durably(path / "environment.json", json.dumps({"script": script} | describe_environment(), indent=2))
            _write_configuration(path, resolved)  # last, because it makes the folder a run
            flush_to_disk(path.parent)
        except OSError as error:
            raise UserError(
                f"runs_dir = {config.runs_dir}: cannot make {path} ({error.strerror}); name another folder"
            ) from None
        return cls(path, resolved, lock)

    @classmethod
    def _take_up(cls, path: Path, config: RunConfig, script: str) -> Self:
        """Return an existing folder, locked. What killed processes left in it is removed.

        Raises:
            UserError: another process writes to the folder, it belongs to another script, or the run is finished.
        """
        lock = lock_folder(path)
        made_by = script_of(path)
        if made_by is None:
            raise UserError(
                f"resume = {path}: {path / 'environment.json'} does not say which script made this run; put the file "
                f'back, or write {{"script": "{script}"}} into it if it was this one'
            )
        if made_by != script:
            raise UserError(
                f"resume = {path}: this is a run of another script ({made_by}, not {script}); use that script"
            )
        _require_usable(path)
        if (path / "final").is_dir() and not changes_since(read_yaml(path / "config.yaml"), config):
            policy = "was removed" if (path / "final" / REMOVED).exists() else f"is in {path / 'final'}"
            raise UserError(f"resume = {path}: this run is finished; its policy {policy}")
        remove_leftovers(path)
        return cls(path, config, lock)

    def _find_checkpoint(self) -> None:
        """Find the newest complete checkpoint. `restore` later brings the folder back to it, or to its start.

        Raises:
            UserError: all checkpoints are damaged, the metrics were lost, a finished run has no checkpoint, or another
                first policy is given.
        """
        path = self.path
        self.checkpoint = newest_whole_checkpoint(on_first(lambda: list_checkpoints(path)))
        record, changes = on_first(self._compare)
        self._train_step, self._wandb_run_id = record.get("train_step", 0), record.get("wandb_run_id")
        self._resumption = {"resumed_after_step": record["step"], "changed_settings": changes}
        print(f"going on after step {record['step']} of {path}" if self.checkpoint else f"starting {path} again")

    def _compare(self) -> tuple[Mapping[str, Any], Sequence[str]]:
        """Return the checkpoint's record, and which settings have changed: since then, or since the run began."""
        damaged = sorted((self.path / "checkpoints").glob("damaged_*"))
        if damaged and self.checkpoint is None:
            raise UserError(
                f"resume = {self.path}: every checkpoint is damaged ({', '.join(file.name for file in damaged)}); "
                "begin a new run under another run_name"
            )
        if self.checkpoint is None and (final := self.path / "final").is_dir():
            with_model = "" if (final / REMOVED).exists() else f" with model={final}"
            raise UserError(
                f"resume = {self.path}: this run is finished, and has no checkpoint to go on from; begin a new run"
                f"{with_model}"
            )
        saved = read_yaml(self.path / "config.yaml")
        changes = changes_since(saved, self.config)
        record: dict[str, Any] = {"step": 0, "metrics_bytes": 0}
        if self.checkpoint is not None:
            require_same_start(saved, self.config, self.checkpoint)
            record = read_record(self.checkpoint)
            if "config" in record and (since := changes_since(record["config"], self.config)):
                changes = since
                print(f"changed since the checkpoint: {', '.join(changes)}")
        _require_metrics(self.path / "metrics.jsonl", record)
        return record, changes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._wandb_run is not None:
            self._try_wandb(lambda run: run.finish(exit_code=0 if error_type is None else 1))
        is_new, is_gone = self._resumption is None, not self.path.is_dir()
        if self._lock is not None:  # the first rank has it
            is_empty = not (self.metrics_bytes() or list_checkpoints(self.path) or any(self.path.glob("samples/*")))
            if error_type is not None and is_new and is_empty:
                # Nothing was run: the name is free for the next try. An error must not hide the one that came first.
                shutil.rmtree(self.path, ignore_errors=True)
            if self.path.is_dir() and not (isinstance(error, Exception) and is_disk_full(error)):
                ended_by = "" if error is None else f"ended by: {error}"
                renew_page(self.path, self.config, state_at_rest(self.path), ended_by)
            self._lock.close()
        if isinstance(error, UserError) or not isinstance(error, Exception):
            return
        if reason := describe_end(error, self.path, is_gone):
            raise UserError(reason) from error

    def log(self, metrics: Metrics) -> None:
        """Append one line to metrics.jsonl, which holds it when this returns. None, NaN and infinities become null."""
        if rank():
            return
        row = {name: json_number(value) for name, value in metrics.items()}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._train_step = int(row.get("train_step") or self._train_step)
        if self._used is not None:
            self._used.add(row)
        if self._wandb_run is not None:
            known = {name: value for name, value in row.items() if value is not None}
            self._try_wandb(lambda run: run.log(known))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all rows logged so far. The first rank reads them for all."""
        return on_first(lambda: read_metrics(self.path))

    def used(self) -> Used:
        """Return what the run has used so far: time and tokens. The metrics are read once, after `restore`."""
        if self._used is None:
            self._used = Used.of(read_metrics(self.path))
        return self._used

    def last_train_step(self) -> int:
        """Return the last optimizer step logged so far. Before the first it is 0."""
        # The checkpoint knows it, too: the last row may have been damaged. Older checkpoints do not.
        rows = self.read_metrics()
        return max([self._train_step, *(row["train_step"] for row in rows if row.get("train_step") is not None)])

    def metrics_bytes(self) -> int:
        """Return the size of metrics.jsonl in bytes. A run resumed from a checkpoint cuts the file to it."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def watched(self, phase: str, seconds: dict[str, float] | None = None) -> AbstractContextManager[None]:
        """Time a phase and end the process if it exceeds its limit. See `plainrl.guard.watched`."""
        devices = {self.config.policy_device}
        if self.config.needs_engine and not self.config.samples_ahead:  # else its GPU is that of another process
            devices.add(self.config.evaluator_device)
        return watched(phase, getattr(self.config, PHASE_LIMITS[phase]), self.path, seconds, sorted(devices - {"cpu"}))

    def restore(self, state: TrainingState, num_steps: int) -> None:
        """Bring state and folder back to the step that the run goes on from. A new run stays at step 0.

        A resumed run changes metrics, configuration and policy in its folder only here. If the model or the engine
        fails before, nothing is lost.

        Args:
            state: the run's, with the policy already loaded from the checkpoint.
            num_steps: how many steps the run is to have in all.

        Raises:
            UserError: the run is already beyond `num_steps`, or the checkpoint was made with other training data.
        """
        if self.checkpoint is not None:
            restore(self.checkpoint, state)
        if state.step > num_steps:
            raise UserError(
                f"resume = {self.path}: the run is at step {state.step} already, {num_steps} are asked for; ask for "
                f"more, or evaluate {self.checkpoint}/model"
            )
        self._used = None
        if self._resumption is not None and rank() == 0:
            discard_after(self.path, state.step)
            if (self.path / "metrics.jsonl").exists():
                os.truncate(self.path / "metrics.jsonl", state.metrics_bytes)  # so that no step is logged twice
                set_damaged_lines_aside(self.path)
            (self.path / "samples").mkdir(exist_ok=True)  # it may have been removed for its space
            _write_configuration(self.path, self.config)
            name = f"environment_resumed_{state.step:06d}.json"
            write_durably(self.path / name, json.dumps({**self._resumption, **describe_environment()}, indent=2))

    def complete_step(self, state: TrainingState, step: int) -> None:
        """Record that a step is complete and all its metrics are logged."""
        state.complete_step(step, self.metrics_bytes())

    def save_checkpoint(self, state: TrainingState) -> Path:
        """Write checkpoints/step_* if it is not there yet, and return its path."""
        path = self.path / "checkpoints" / f"step_{state.step:06d}"
        if not on_first(path.exists):
            record = {
                "config": self.config.model_dump(mode="json"),
                "wandb_run_id": self._wandb_run_id,
                "train_step": self._train_step,
            }
            if self.metrics_bytes() and rank() == 0:
                flush_to_disk(self.path / "metrics.jsonl")
            with self.watched("save"):
                write_checkpoint(path, state, record)
        return path

    def prune_checkpoints(self, keep_last: int, keep_best: bool) -> None:
        """Remove all checkpoints but the newest `keep_last` and, with `keep_best`, the one with the best evaluation."""
        if rank():
            return
        saved, score = list_checkpoints(self.path), self.config.eval_score
        kept = saved[-keep_last:]
        scores = {row["eval_step"]: row[score] for row in read_metrics(self.path) if row.get(score) is not None}
        evaluated = [path for path in saved if step_of(path) in scores]
        if keep_best and evaluated:
            kept.append(max(evaluated, key=lambda path: scores[step_of(path)]))
        for path in saved:
            if path not in kept:
                remove_checkpoint(path)

    def finish(self) -> Path:
        """Link the policy of the last checkpoint as final/, which takes no further disk space, and return its path."""
        final, unfinished = self.path / "final", self.path / ".final.unfinished"
        if rank():
            return final
        for path in (final, unfinished):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(list_checkpoints(self.path)[-1] / "model", unfinished, copy_function=_link_or_copy)
        unfinished.rename(final)
        print(f"model, metrics, samples and figures: {self.path} (load the model from {final}; look at report.html)")
        return final

    def show_evaluation(self, step: int, num_printed: int) -> None:
        """Print examples of an evaluation, and renew training.png, report.html and wandb's table of samples."""
        if rank():
            return
        samples = show_evaluation(self.path, step, num_printed, self.config)
        if self._wandb_run is not None:
            self._try_wandb(lambda run: run.log({"eval_step": step, "eval/samples": make_samples_table(samples)}))

    def start_wandb(self) -> None:
        """Start wandb, if it is on. It receives whatever is logged from here on."""
        if rank():
            return
        self._wandb_run = start_wandb(self.config, self.path, self._wandb_run_id)
        if self._wandb_run is not None:
            self._wandb_run_id = self._wandb_run.id

    def _try_wandb(self, call: Callable[[Any], object]) -> None:
        try:
            call(self._wandb_run)
        except Exception as error:  # of any type, because wandb must not end a run that has metrics.jsonl
            print(f"warning: wandb failed ({first_line(error)}) and is off from here on; metrics.jsonl has everything")
            self._wandb_run = None


def script_of(folder: Path) -> str | None:
    """Return the script that made a run's folder, read from environment.json, or None if that cannot be read."""
    script = read_json_object(folder / "environment.json").get("script")
    return script if isinstance(script, str) else None


def state_at_rest(folder: Path) -> str:
    """Return the state of a run that no process holds: finished, or whether it can be resumed."""
    if (folder / "final").is_dir() or (script_of(folder) == EVALUATION and is_evaluated(folder)):
        return FINISHED
    return "stopped, can be resumed" if list_checkpoints(folder) else "stopped"


def _require_usable(folder: Path) -> None:
    """Raise a UserError if something in a run's folder is not of the kind that the run needs to write there."""
    kinds = {"file": ("config.yaml", "metrics.jsonl"), "folder": ("samples", "checkpoints", "final")}
    for kind, path in [(kind, folder / name) for kind, names in kinds.items() for name in names]:
        if os.path.lexists(path) and not (path.is_file() if kind == "file" else path.is_dir()):
            raise UserError(f"{path} is not a {kind}: remove or rename it, then resume the run")
        if path.exists() and not os.access(path, os.R_OK | os.W_OK):
            raise UserError(f"{path} may not be read and written by you: copy {folder}, and resume the copy")


def _require_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """Raise a UserError if metrics.jsonl does not begin with what it held when the checkpoint was made."""
    content, size = path.read_bytes() if path.exists() else b"", record["metrics_bytes"]
    problem = None
    if len(content) < size:
        problem = f"has {len(content)} bytes, but {size}"
    elif size and content[size - 1 : size] != b"\n":
        problem = f"was changed: no line ends at byte {size}, as one did"
    if problem:
        raise UserError(
            f"{path} {problem} when the checkpoint of step {record['step']} was made; put the file back, or start a "
            "new run from that checkpoint's model/"
        )


def _write_configuration(folder: Path, config: RunConfig) -> None:
    path = folder / "config.yaml"
    values = config.model_dump(mode="json", exclude={"resume", "resume_with_changes"})
    text = yaml.safe_dump(values, sort_keys=False)
    if not path.exists() or path.read_text() != text:
        write_durably(path, text)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)
