"""Run the variants and seeds of a sweep file, in as many sessions as it takes.

    uv run python -m experiments.sweep experiments/sweeps/NAME.yaml [--dry-run] [--variant NAME] [--gpus 0,1]
                                       [--rerun VARIANT] [keep_weights=best] [seeds=[0]] [key=value ...]

Further `key=value` arguments go to every run. A run's folder is runs/<sweep>-<variant>-seed<k>. Its output goes to
the file runs/<that>.log. An interrupted run continues from its last checkpoint.

When a run ends well, its figures go to results/<sweep>/ (see sweep_results.py), which is committed. From then on the
run counts as finished, even without its folder. Its weights, gigabytes of them, are removed, unless `keep_weights`
says otherwise. The committed row holds a fingerprint of script, settings and preset (see sweep_plan.py). `--rerun`
removes the rows and folders of a variant, and runs it again. At the end the sweep's figure is drawn, and its table
written (see sweep_figures.py). If two runs in a row end with the same error, no further one is started.

With another preset than laptop the sweep is called <file>-<preset>. So no row mixes two kinds of machines.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.sweep_figures import write_figures_and_table
from experiments.sweep_plan import REPOSITORY, SCRIPTS, Run, defaults_of
from experiments.sweep_results import collect_run, forget_run, read_table
from experiments.usage import SWEEP, plan_sweep
from plainrl.changes import describe_changes, with_defaults
from plainrl.checkpoint_files import REMOVED, list_checkpoints, step_of
from plainrl.cli import EVALUATION_SCRIPT, PROGRAMS, read_yaml, require_one_process, run_main, say
from plainrl.devices import run_command
from plainrl.folder_lock import lock_folder
from plainrl.records import UserError
from plainrl.run_records import read_metrics

POLL_SECONDS = 0.5
STARTED = "sweep: started"  # in the log of a run
KEPT = {  # by keep_weights
    "none": "removed (keep_weights=last, best or all keeps some)",
    "last": "final/ is kept",
    "best": "those of the best evaluation are kept, as best/",
    "all": "kept",
}


def main(arguments: list[str]) -> None:
    """Print the plan, then run what is left of it."""
    require_one_process("a sweep")
    options, results, runs = plan_sweep(arguments)
    gpus, order = options.gpus, list(dict.fromkeys(run.variant for run in runs))
    runs = [run for run in runs if run.variant in ([*options.variant, *options.rerun] or order)]
    again = [run for run in runs if run.variant in options.rerun]
    states = {run: "to do" if run in again else state_of(run, results) for run in runs}
    for run, state in states.items():
        print(f"{state:<11}  {run.minutes:>5.0f} min  {run.folder.name}")
    left = [run for run, state in states.items() if state in ("interrupted", "to do")]
    hours = sum(run.minutes for run in left) / 60 / max(len(gpus), 1)
    print(f"{len(left)} of {len(runs)} runs to go, about {hours:.1f} hours on the laptop preset; results: {results}")
    if options.dry_run:
        return

    print(f"weights of finished runs: {KEPT[runs[0].keep_weights]}")
    for run in left:
        if run.folder.is_dir():
            lock_folder(run.folder).close()  # it may still be running, if the sweep alone was killed
    for run in again:
        forget(run, results)
    for run, state in states.items():
        if state == "to collect":
            collect(run, results, order)
    failures = execute(left, gpus, lambda run: collect(run, results, order))
    write_figures_and_table(results, options.sweep.stem)  # always: an earlier sitting may have ended before
    if failures:
        print("\n".join(["failed:", *(f"  {run.log}: {line}" for run, line in failures.items())]), file=sys.stderr)
        sys.exit(1)


def state_of(run: Run, results: Path) -> str:
    """Return `finished`, `to collect`, `interrupted` or `to do`.

    `to collect`: the run ended well, but its figures are not in the results yet.

    Raises:
        UserError: the results or the run's folder were made with other settings.
    """
    for row in read_table(results / "runs.csv"):
        if (row["variant"], row["seed"]) == (run.variant, str(run.seed)):
            if difference := run.describe_difference(row["fingerprint"]):
                raise UserError(
                    f"{results / 'runs.csv'}: {run.variant}, seed {run.seed} was run with {difference} (fingerprint "
                    f"{row['fingerprint']}, now {run.fingerprint}); --rerun {run.variant} runs it again, or use "
                    "another sweep file"
                )
            return "finished"
    if not (run.folder / "config.yaml").is_file():
        return "to do"
    schema = PROGRAMS[SCRIPTS[run.script]][0]
    saved = with_defaults(read_yaml(run.folder / "config.yaml"), schema)
    asked = {**defaults_of(schema), **run.values, "seed": run.seed}  # with what the preset gives, like a fingerprint
    asked.pop("warm_start", None)  # `values` has the values of a warm start there, and the run's folder its name
    asked |= run.settings
    if changes := describe_changes({key: saved.get(key) for key in asked}, asked):
        raise UserError(
            f"{run.folder} was run with other settings: {', '.join(changes)}; --rerun {run.variant} runs it again"
        )
    is_evaluated = run.script == EVALUATION_SCRIPT and bool(read_metrics(run.folder))
    return "to collect" if is_evaluated or (run.folder / "final").is_dir() else "interrupted"


def execute(runs: Sequence[Run], gpus: Sequence[str], collect_finished: Callable[[Run], None]) -> dict[Run, str]:
    """Run one at a time, or one at a time on each GPU; collect those that end well.

    If two runs in a row end with the same error, those in progress are waited for, and no other is started. If anything
    ends this early, the runs in progress get SIGTERM. They save themselves before it returns.

    Returns:
        The last line that each failed run wrote.
    """
    waiting, failures, previous = list(runs), {}, None
    slots: dict[str, tuple[Run, subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or slots:
            for gpu in gpus or [""]:
                if gpu not in slots and waiting:
                    run = waiting.pop(0)
                    slots[gpu] = (run, _start(run, gpu), time.monotonic())
                    print(f"{len(runs) - len(waiting)} of {len(runs)}: {run.log}", flush=True)
            time.sleep(POLL_SECONDS)
            for gpu, (run, process, started) in list(slots.items()):
                if process.poll() is not None:
                    del slots[gpu]
                    last_line = _note_end(run, process, started)
                    if process.returncode == 0:
                        collect_finished(run)
                        previous = None
                        continue
                    failures[run], kind = last_line, _kind_of_error(last_line, run)
                    if kind == previous and waiting:
                        say(f"the same error twice in a row: {len(waiting)} runs are not started")
                        waiting.clear()
                    previous = kind
    finally:
        if slots:
            # To stderr, by a call that raises nothing: the output may be closed, and the runs must be stopped.
            say("stopping: the runs in progress save themselves; a second signal stops them at once")
            try:
                _stop([process for _, process, _ in slots.values()])
            except KeyboardInterrupt:
                _stop([process for _, process, _ in slots.values()])
            for run, process, started in slots.values():
                _note_end(run, process, started)
            # What is run again goes on, too, and nothing else is run.
            arguments = re.sub(r"--rerun([ =])", r"--variant\1", shlex.join(sys.argv[1:]))
            say(f"to continue: {run_command(SWEEP)} {arguments}")
    return failures


def collect(run: Run, results: Path, order: Sequence[str]) -> None:
    """Write a run's figures into the results; then remove its weights, but for those that are to be kept."""
    log = run.log.read_text(errors="replace") if run.log.exists() else ""
    ends = re.findall(r"^sweep: ended with status (-?\d+) after ([\d.]+) minutes$", log, re.MULTILINE)
    # Without a good end at last the run went on by itself, when the sweep was killed. Or both were.
    is_known = bool(ends) and ends[-1][0] == "0" and len(ends) == log.splitlines().count(STARTED)
    wall_minutes = sum(float(minutes) for _, minutes in ends) if is_known else None
    names = {"variant": run.variant, "seed": run.seed, "fingerprint": run.fingerprint}
    row = collect_run(run.folder, results, names, wall_minutes, order)
    remove_weights(run)
    reward = row["last_answer_reward"]
    time_taken = "unknown time" if wall_minutes is None else f"{wall_minutes:.1f} minutes"
    print(f"finished: {run.folder.name}, {time_taken}, answer reward {reward}", flush=True)


def remove_weights(run: Run) -> None:
    """Remove a finished run's weights, but for those that are to be kept: see `Sweep.keep_weights`.

    The best checkpoint is the first with the best score, by the script's own measure, of those that were both saved and
    evaluated. If there is none, final/ stays.
    """
    folder, kept = run.folder, run.keep_weights
    score = PROGRAMS[SCRIPTS[run.script]][0].model_construct().eval_score
    removed = {"all": [], "last": ["checkpoints"]}.get(kept, ["checkpoints", "final"])
    if kept == "best":
        scores = {row["eval_step"]: row[score] for row in read_metrics(folder) if row.get(score) is not None}
        saved = {step_of(path): path for path in list_checkpoints(folder)}
        if evaluated := [step for step in saved if step in scores]:
            shutil.rmtree(folder / "best", ignore_errors=True)  # of the same run, collected before
            (saved[max(evaluated, key=lambda step: scores[step])] / "model").rename(folder / "best")
        elif not (folder / "best").is_dir():
            removed = ["checkpoints"]
            print(f"{folder}: no checkpoint was both saved and evaluated, so that final/ is kept")
    is_marked = "final" in removed and (folder / "final").is_dir()
    for name in removed:
        shutil.rmtree(folder / name, ignore_errors=True)
    if is_marked:  # the folder stays, because it says that the run is finished
        (folder / "final").mkdir()
        (folder / "final" / REMOVED).write_text(f"A sweep has removed these weights: keep_weights={kept}.\n")


def forget(run: Run, results: Path) -> None:
    """Remove a run's rows in the results, its folder and its log.

    Raises:
        UserError: a process writes to the folder.
    """
    if run.folder.is_dir():
        lock_folder(run.folder).close()
        shutil.rmtree(run.folder)
    run.log.unlink(missing_ok=True)
    forget_run(results, run.variant, run.seed)


def _kind_of_error(line: str, run: Run) -> str:
    """Return a run's last line without what differs from run to run: its name, and numbers."""
    return re.sub(r"\d+", "0", line.replace(run.folder.name, "RUN"))


def _start(run: Run, gpu: str) -> subprocess.Popen[bytes]:
    if run.script == EVALUATION_SCRIPT and run.folder.is_dir():
        lock_folder(run.folder).close()  # another sweep may have begun it meanwhile
        shutil.rmtree(run.folder)  # an interrupted evaluation cannot be resumed
    run.log.parent.mkdir(parents=True, exist_ok=True)
    search_path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": search_path} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    is_resumed = (run.folder / "config.yaml").exists()  # if not, the log is of a run that was removed
    with run.log.open("a" if is_resumed else "w") as log:
        log.write(f"\n{STARTED}\n" if is_resumed else f"{STARTED}\n")
        log.flush()
        # A session of its own: Ctrl-C reaches the run once, from here, and not from the terminal too.
        return subprocess.Popen(run.command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def _note_end(run: Run, process: subprocess.Popen[bytes], started: float) -> str:
    """Write status and time into the log; return the last line before them."""
    lines = map(str.strip, run.log.read_text(errors="replace").splitlines())
    lines = [line for line in lines if line not in ("", STARTED)]
    minutes = (time.monotonic() - started) / 60
    with run.log.open("a") as log:
        log.write(f"\nsweep: ended with status {process.returncode} after {minutes:.4f} minutes\n")
    return lines[-1] if lines else f"status {process.returncode}"


if __name__ == "__main__":
    run_main(main)
