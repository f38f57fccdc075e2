"""A table of all runs, two runs compared, and runs beside each other in one page.

    uv run python -m experiments.runs [runs_dir]                 all runs: state, step, rewards, time
    uv run python -m experiments.runs compare A B [FIGURE.png]   two runs: the settings that differ, their curves
    uv run python -m experiments.runs report A [B ...] [PAGE.html]    runs in one page: curves, responses, settings

`runs_dir` is the folder that holds the runs' folders, A and B are two of these. The figure is written beside A if no
other file is named. So is the page of several runs. That of one run is its report.html.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path

from experiments.usage import RUNS, check_runs
from plainrl.changes import describe_changes, with_defaults
from plainrl.cli import read_yaml, run_main
from plainrl.clock import OF_RUN
from plainrl.devices import run_command
from plainrl.folder_lock import is_locked
from plainrl.help import SCHEMAS
from plainrl.records import UserError
from plainrl.report.contents import read_run
from plainrl.report.curves import with_axes
from plainrl.report.page import NAME, write_page
from plainrl.run_folder import FINISHED, state_at_rest
from plainrl.run_records import EVAL_SCORE, Line, plot_metrics, read_metrics

MOST_SECONDS = 1e12  # what a time can show


def main(arguments: list[str]) -> None:
    """Print the table of runs, compare two, or write a page."""
    check_runs(arguments)
    if arguments[:1] == ["compare"]:
        one, other, *figure = map(Path, arguments[1:])
        if figure and figure[0].suffix != ".png":
            raise UserError(f"compare: the figure {figure[0]} is no .png; name it {figure[0].with_suffix('.png')}")
        print("\n".join(compare_settings(one, other)))  # before the figure, which it may not be possible to write
        print(f"curves: {draw_curves(one, other, *figure)}")
    elif arguments[:1] == ["report"]:
        print(f"page: {write_report(arguments[1:])}")
    else:
        print(list_runs(Path(*arguments or ["runs"])))


def list_runs(runs_dir: Path) -> str:
    """Return a table of all runs in a folder, the oldest first."""
    folders = [path.parent for path in runs_dir.glob("*/config.yaml")]
    if not folders:
        raise UserError(f"{runs_dir} holds no run; name the folder that holds the runs' folders")
    found = {folder: describe_run(folder) for folder in sorted(folders, key=_age)}
    table = [cells for cells, _ in found.values()]
    widths = {key: max(len(key), *(len(line[key]) for line in table)) for key in table[0]}
    lines = [{key: key for key in widths}, *table]
    shown = ["  ".join(line[key].ljust(width) for key, width in widths.items()).rstrip() for line in lines]
    return "\n".join([*shown, *(f"damaged: {fault}" for _, fault in found.values() if fault)])


def describe_run(folder: Path) -> tuple[dict[str, str], str | None]:
    """Return one line of the table of runs, and what is wrong with its metrics, if anything is.

    Its steps are those of its page: rollout batches in GRPO, optimizer steps in SFT. Its time is that of training steps
    and evaluations, as logged, without loading, saving and lost work.
    """
    cells = {"name": folder.name, "state": state_of(folder)}
    try:
        rows = read_metrics(folder)
    except (UserError, OSError) as error:  # the other runs are shown all the same
        return cells | dict.fromkeys(("step", "last reward", "best reward", "time"), "?"), str(error)

    def known(name: str) -> list[float]:
        return [row[name] for row in rows if row.get(name) is not None]

    steps = [int(row["step"]) for row in with_axes(rows) if row.get("train_step") is not None]
    scores = known(EVAL_SCORE)
    seconds = sum(sum(known(name)) for name in OF_RUN)
    return cells | {
        "step": str(max(steps, default=0)),
        "last reward": f"{scores[-1]:.3f}" if scores else "-",
        "best reward": f"{max(scores):.3f}" if scores else "-",
        "time": str(datetime.timedelta(seconds=round(min(seconds, MOST_SECONDS)))),
    }, None


def compare_settings(one: Path, other: Path) -> list[str]:
    """Return the settings that differ between two runs, in lines. A key that one lacks has its default there."""
    for folder in (one, other):
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder} is no run, for it has no config.yaml; name the folder of a run")
    values = [read_yaml(folder / "config.yaml") for folder in (one, other)]
    # An older version of a script lacked some keys. Two scripts have different keys, which are shown.
    schema = next(
        (schema for schema in SCHEMAS if values[0].keys() | values[1].keys() <= schema.model_fields.keys()), None
    )
    changes = describe_changes(*(with_defaults(of_run, schema) if schema else of_run for of_run in values))
    return [f"{one.name} -> {other.name}", *(changes or ["no setting differs"])]


def draw_curves(one: Path, other: Path, figure: Path | None = None) -> Path:
    """Draw the curves of two runs into one figure, next to the first one's folder if no file is named; return it.

    Raises:
        UserError: the figure cannot be written.
    """
    figure = figure or one.parent / f"compare_{one.name}_{other.name}.png"
    metrics = list(zip(names_of((one, other)), map(read_metrics, (one, other)), strict=True))
    curves = {
        "validation answer reward": ("eval_step", EVAL_SCORE),
        "token entropy (nats)": ("train_step", "train/token_entropy"),
        "gradient norm": ("train_step", "train/grad_norm"),
    }
    panels = {
        title: [Line(rows, axis, metric, name) for name, rows in metrics] for title, (axis, metric) in curves.items()
    }
    try:
        plot_metrics(panels, figure)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"the figure {figure} cannot be written ({reason}); name another file: {run_command(RUNS)} compare "
            f"{one} {other} FIGURE.png"
        ) from None
    return figure


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the runs' names, with the folders above those that are not unique."""
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    return [
        name if names.count(name) == 1 else f"{path.parent.name}/{name}"
        for name, path in zip(names, paths, strict=True)
    ]


def write_report(arguments: Sequence[str]) -> Path:
    """Write the page of one or several runs, and return its path.

    Args:
        arguments: the folders of the runs, and at the end the page's path if it is to be another one.

    Raises:
        UserError: a folder holds no run, its metrics are damaged, or the page cannot be written.
    """
    folders = [Path(argument) for argument in arguments if not argument.endswith(".html")]
    named = [Path(argument) for argument in arguments if argument.endswith(".html")]
    if not folders or len(named) > 1:
        raise UserError(f"report: name one run or several, and at most one page: {run_command(RUNS)} report FOLDER")
    beside = folders[0].parent / f"report_{'_'.join(folder.name for folder in folders)}.html"
    path = named[0] if named else (folders[0] / NAME if len(folders) == 1 else beside)
    runs = [read_run(folder, state_of(folder)) for folder in folders]
    for run, name in zip(runs, names_of(folders), strict=True):
        run["name"] = name
    try:
        return write_page(runs, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"the page {path} cannot be written ({reason}); name another file: {run_command(RUNS)} report "
            f"{' '.join(map(str, folders))} PAGE.html"
        ) from None


def state_of(folder: Path) -> str:
    """Return whether a run is finished, running or stopped; unknown if its lock cannot be opened."""
    state = state_at_rest(folder)
    try:
        return "running" if is_locked(folder) else state
    except OSError:
        return state if state == FINISHED else "unknown"


def _age(folder: Path) -> float:
    return (folder / "config.yaml").lstat().st_mtime  # of a link itself: what it points to may be gone


if __name__ == "__main__":
    run_main(main)
