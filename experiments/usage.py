"""The arguments of the programs here that have no configuration. They are read before anything large is imported.

Each program reads its arguments again by the same function. plainrl/cli.py does so for the others.
"""

from plainrl.startup import own_command

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.sweep_plan import Run, plan
from plainrl.cli import run_main
from plainrl.devices import run_command
from plainrl.records import UserError

SWEEP, RUNS, PASS_AT_K = (f"python -m experiments.{name}" for name in ("sweep", "runs", "pass_at_k"))
RESULTS_OPTION = "--results="


def check_arguments() -> None:
    """Find the mistakes in the arguments, and answer `--help`, if one of these programs is run."""
    command = own_command(getattr(sys.modules.get("__main__"), "__file__", None), sys.orig_argv)
    if check := CHECKS.get(f"python {command}"):
        run_main(check)


def plan_sweep(arguments: list[str]) -> tuple[argparse.Namespace, Path, list[Run]]:
    """Return the options of experiments/sweep.py, the folder of the results, and all runs of the sweep.

    Raises:
        UserError: the sweep file or an argument is wrong.
    """
    parser = argparse.ArgumentParser(prog=run_command(SWEEP), description="Run the variants and seeds of a sweep file.")
    parser.add_argument("sweep", type=Path, help="experiments/sweeps/NAME.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="for every run; seeds=[0]: only these seeds; keep_weights=none|last|best|all: of finished runs",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the runs, their states and estimated time")
    parser.add_argument("--variant", action="append", default=[], help="run only this variant (may be repeated)")
    parser.add_argument("--gpus", default="", help="0,1: one run at a time on each of these (CUDA_VISIBLE_DEVICES)")
    parser.add_argument("--rerun", action="append", default=[], help="run this variant again (may be repeated)")
    options = parser.parse_intermixed_args(arguments)
    options.gpus = re.findall(r"[^, ]+", options.gpus)
    results, runs = plan(options.sweep, options.overrides, on_one_gpu=bool(options.gpus))
    variants = list(dict.fromkeys(run.variant for run in runs))
    for option in ("variant", "rerun"):
        if unknown := set(getattr(options, option)) - set(variants):
            raise UserError(f"--{option} {min(unknown)}: {options.sweep} has {' '.join(variants)}")
    return options, results, runs


def check_runs(arguments: Sequence[str]) -> None:
    """Raise a UserError that says how experiments/runs.py is used, if the arguments are not such."""
    is_comparison = arguments[:1] == ["compare"] and len(arguments) in (3, 4)
    is_report = arguments[:1] == ["report"] and len(arguments) > 1
    is_table = len(arguments) <= 1 and arguments not in (["--help"], ["-h"], ["report"], ["compare"])
    if not (is_comparison or is_report or is_table):
        command = run_command(RUNS)
        raise UserError(
            f"usage: {command} [runs_dir], or {command} compare FOLDER FOLDER [FIGURE], or {command} report FOLDER ... "
            "[PAGE.html]"
        )


def read_labels(arguments: Sequence[str]) -> tuple[Path, list[tuple[str, Path]]]:
    """Return the folder of the results of experiments/pass_at_k.py, and label and run of each pair LABEL=RUN.

    Raises:
        UserError: an argument is neither an option nor a pair.
    """
    named = [argument.removeprefix(RESULTS_OPTION) for argument in arguments if argument.startswith(RESULTS_OPTION)]
    pairs = [argument.partition("=") for argument in arguments if not argument.startswith(RESULTS_OPTION)]
    if not all(label and folder for label, _, folder in pairs):
        raise UserError(
            f"usage: {run_command(PASS_AT_K)} [{RESULTS_OPTION}FOLDER] [LABEL=RUN ...], where RUN is the folder of a "
            "run"
        )
    return Path(*named[-1:] or ["results"]), [(label, Path(folder)) for label, _, folder in pairs]


CHECKS: dict[str, Callable[[list[str]], Any]] = {SWEEP: plan_sweep, RUNS: check_runs, PASS_AT_K: read_labels}
