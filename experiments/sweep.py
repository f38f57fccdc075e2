"""Run the variants and seeds of a sweep file, in as many sessions as it takes.

    uv run python -m experiments.sweep experiments/sweeps/NAME.yaml [--dry-run] [--variant NAME] [--gpus 0,1]
                                       [--keep-weights] [seeds=[0]] [key=value ...]

Further `key=value` arguments go to every run. A run's folder is runs/<sweep>-<variant>-seed<k>. Its output goes to
the file runs/<that>.log. An interrupted run continues from its last checkpoint.

When a run ends well, its figures go to results/<sweep>/ (see sweep_results.py), which is committed. From then on the
run counts as finished, even without its folder. Its weights, gigabytes of them, are removed. The committed row holds
a fingerprint of script and settings, not of the preset's own values. Who changes a preset removes the rows.

With another preset than laptop the sweep is called <file>-<preset>. So no row mixes two kinds of machines.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.sweep_plan import EVALUATION_SCRIPT, REPOSITORY, SCRIPTS, Run, plan
from experiments.sweep_results import collect_run, read_table
from plainrl.changes import describe_changes, with_defaults
from plainrl.cli import read_yaml, run_main, say
from plainrl.devices import run_command
from plainrl.records import UserError
from plainrl.run_records import read_metrics

COMMAND = "python -m experiments.sweep"
POLL_SECONDS = 0.5


def main(arguments: list[str]) -> None:
    """Print the plan, then run what is left of it."""
    options = parse_arguments(arguments)
    gpus = re.findall(r"[^, ]+", options.gpus)
    results, runs = plan(options.sweep, options.overrides, "one-gpu" if gpus else "auto")
    order = list(dict.fromkeys(run.variant for run in runs))
    if unknown := set(options.variant) - set(order):
        raise UserError(f"--variant {min(unknown)}: {options.sweep} has {' '.join(order)}")
    runs = [run for run in runs if run.variant in (options.variant or order)]
    states = {run: state_of(run, results) for run in runs}
    for run, state in states.items():
        print(f"{state:<11}  {run.minutes:>5.0f} min  {run.folder.name}")
    left = [run for run, state in states.items() if state in ("interrupted", "to do")]
    hours = sum(run.minutes for run in left) / 60 / max(len(gpus), 1)
    print(f"{len(left)} of {len(runs)} runs to go, about {hours:.1f} hours on the laptop preset; results: {results}")
    if options.dry_run:
        return

    for run, state in states.items():
        if state == "to collect":
            collect(run, results, order, options.keep_weights)
    failures = execute(left, gpus, lambda run: collect(run, results, order, options.keep_weights))
    if failures:
        print("\n".join(["failed:", *(f"  {run.log}: {line}" for run, line in failures.items())]), file=sys.stderr)
        sys.exit(1)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog=run_command(COMMAND), description="Run the variants and seeds of a sweep file."
    )
    parser.add_argument("sweep", type=Path, help="experiments/sweeps/NAME.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run; seeds=[0]: only these seeds")
    parser.add_argument("--dry-run", action="store_true", help="only print the runs, their states and estimated time")
    parser.add_argument("--variant", action="append", default=[], help="run only this variant (may be repeated)")
    parser.add_argument("--gpus", default="", help="0,1: one run at a time on each of these (CUDA_VISIBLE_DEVICES)")
    parser.add_argument("--keep-weights", action="store_true", help="keep final/ and checkpoints/ of finished runs")
    return parser.parse_intermixed_args(arguments)


def state_of(run: Run, results: Path) -> str:
    """Return `finished`, `to collect`, `interrupted` or `to do`.

    `to collect`: the run ended well, but its figures are not in the results yet.

    Raises:
        UserError: the results or the run's folder were made with other settings.
    """
    for row in read_table(results / "runs.csv"):
        if (row["variant"], row["seed"]) == (run.variant, str(run.seed)):
            if row["fingerprint"] != run.fingerprint:
                raise UserError(
                    f"{results / 'runs.csv'}: {run.variant}, seed {run.seed} was run with other settings (fingerprint "
                    f"{row['fingerprint']}, now {run.fingerprint}); remove the row, and {run.folder}, to run it again"
                )
            return "finished"
    if not (run.folder / "config.yaml").is_file():
        return "to do"
    saved = with_defaults(read_yaml(run.folder / "config.yaml"), SCRIPTS[run.script].schema)
    changes = describe_changes({key: saved.get(key) for key in run.settings}, run.settings)
    if changes:
        raise UserError(f"{run.folder} was run with other settings: {', '.join(changes)}; remove it to run it again")
    is_evaluated = run.script == EVALUATION_SCRIPT and bool(read_metrics(run.folder))
    return "to collect" if is_evaluated or (run.folder / "final").is_dir() else "interrupted"


def execute(runs: Sequence[Run], gpus: Sequence[str], collect_finished: Callable[[Run], None]) -> dict[Run, str]:
    """Run one at a time, or one at a time on each GPU; collect those that end well.

    If anything ends this early, the runs in progress get SIGTERM. They save themselves before it returns.

    Returns:
        The last line that each failed run wrote.
    """
    waiting, failures = list(runs), {}
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
                    else:
                        failures[run] = last_line
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
            say(f"to continue: {run_command(COMMAND)} {shlex.join(sys.argv[1:])}")
    return failures


def collect(run: Run, results: Path, order: Sequence[str], keep_weights: bool) -> None:
    """Write a run's figures into the results; then remove its weights."""
    log = run.log.read_text(errors="replace") if run.log.exists() else ""
    wall_minutes = sum(map(float, re.findall(r"^sweep: .* after ([\d.]+) minutes$", log, re.MULTILINE)))
    names = {"variant": run.variant, "seed": run.seed, "fingerprint": run.fingerprint}
    row = collect_run(run.folder, results, names, wall_minutes, order)
    for name in () if keep_weights else ("final", "checkpoints"):
        shutil.rmtree(run.folder / name, ignore_errors=True)
    reward = row["last_answer_reward"]
    print(f"finished: {run.folder.name}, {wall_minutes:.1f} minutes, answer reward {reward}", flush=True)


def _start(run: Run, gpu: str) -> subprocess.Popen[bytes]:
    if run.script == EVALUATION_SCRIPT:
        shutil.rmtree(run.folder, ignore_errors=True)  # an interrupted evaluation cannot be resumed
    run.log.parent.mkdir(parents=True, exist_ok=True)
    search_path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": search_path} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    is_resumed = (run.folder / "config.yaml").exists()  # if not, the log is of a run that was removed
    with run.log.open("a" if is_resumed else "w") as log:
        # A session of its own: Ctrl-C reaches the run once, from here, and not from the terminal too.
        return subprocess.Popen(run.command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def _note_end(run: Run, process: subprocess.Popen[bytes], started: float) -> str:
    """Write status and time into the log; return the last line before them."""
    lines = [line.strip() for line in run.log.read_text(errors="replace").splitlines() if line.strip()]
    minutes = (time.monotonic() - started) / 60
    with run.log.open("a") as log:
        log.write(f"\nsweep: ended with status {process.returncode} after {minutes:.4f} minutes\n")
    return lines[-1] if lines else f"status {process.returncode}"


if __name__ == "__main__":
    run_main(main)
