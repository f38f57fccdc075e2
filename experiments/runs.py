"""A table of all runs, and two runs compared.

    uv run python -m experiments.runs [runs_dir]     all runs: state, step, last and best validation reward, time
    uv run python -m experiments.runs compare A B    two runs: the settings that differ, their curves in one figure

`runs_dir` is the folder that holds the runs' folders, A and B are two of these.
"""

import datetime
import fcntl
from pathlib import Path

from plainrl.cli import read_yaml, run_main
from plainrl.config import describe_changes
from plainrl.records import UserError
from plainrl.run_folder import EVALUATION, list_checkpoints, script_of
from plainrl.run_records import EVAL_SCORE, Line, plot_metrics, read_metrics

COMMAND = "uv run python -m experiments.runs"


def main(arguments: list[str]) -> None:
    """Print the table of runs, or compare two."""
    if arguments[:1] == ["compare"] and len(arguments) == 3:
        print(compare_runs(Path(arguments[1]), Path(arguments[2])))
    elif len(arguments) <= 1 and arguments != ["--help"]:
        print(list_runs(Path(*arguments or ["runs"])))
    else:
        raise UserError(f"usage: {COMMAND} [runs_dir], or {COMMAND} compare FOLDER FOLDER")


def list_runs(runs_dir: Path) -> str:
    """Return a table of all runs in a folder, the oldest first."""
    paths = sorted(runs_dir.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(f"{runs_dir} holds no run; name the folder that holds the runs' folders")
    table = [describe_run(path.parent) for path in paths]
    widths = {key: max(len(key), *(len(line[key]) for line in table)) for key in table[0]}
    lines = [{key: key for key in widths}, *table]
    return "\n".join("  ".join(line[key].ljust(width) for key, width in widths.items()).rstrip() for line in lines)


def describe_run(folder: Path) -> dict[str, str]:
    """Return one line of the table of runs.

    Its time is that of training steps and evaluations, as logged, without loading, saving and lost work.
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


def compare_runs(one: Path, other: Path) -> str:
    """Return the settings that differ between two runs; draw their curves into one figure next to their folders."""
    for folder in (one, other):
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder} is no run, for it has no config.yaml; name the folder of a run")
    changes = describe_changes(read_yaml(one / "config.yaml"), read_yaml(other / "config.yaml"))
    figure = one.parent / f"compare_{one.name}_{other.name}.png"
    names = (
        (one.name, other.name)
        if one.name != other.name
        else tuple(f"{folder.parent.name}/{folder.name}" for folder in (one, other))
    )
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


def _state_of(folder: Path) -> str:
    """Return whether a run is finished, running or stopped; unknown if its lock cannot be opened."""
    if (folder / "final").is_dir() or (script_of(folder) == EVALUATION and (folder / "metrics.jsonl").exists()):
        return "finished"
    try:
        with (folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "running"
    except OSError:
        return "unknown"
    return "stopped, can be resumed" if list_checkpoints(folder) else "stopped"


if __name__ == "__main__":
    run_main(main)
