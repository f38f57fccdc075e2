"""pass@k and maj@k of several policies over k: does training add answers, or does it sharpen what is there?

    uv run python -m experiments.pass_at_k LABEL=RUN [LABEL=RUN ...]     collect runs, then draw and print
    uv run python -m experiments.pass_at_k                               draw and print what was collected
    uv run python -m experiments.pass_at_k --results=FOLDER ...          in FOLDER/pass_at_k, not results/pass_at_k

A run is the folder of an evaluation or of a training run with `num_eval_samples` above 1. A training run is represented
by its last evaluation. Runs of one label are its seeds. All runs must have asked the same questions, with as many
samples at one temperature. What is collected stands in results/pass_at_k/pass_at_k.csv, one row for each run and
k. experiments/plot_results.py draws the figure from it too.

A policy whose curve is higher at k = 1 and lower at the largest k has been sharpened: it gives its likely answers more
often, and has lost others. Source: Yue et al. 2025 (arXiv 2504.13837). docs/metrics.md defines the two quantities.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.intervals import difference_and_half_width, mean_and_half_width
from experiments.result_tables import put_table
from experiments.sweep_results import as_text, read_table, write_rows
from experiments.usage import PASS_AT_K, read_labels
from plainrl.changes import with_defaults
from plainrl.cli import read_yaml, require_one_process, run_main
from plainrl.config import SFTConfig
from plainrl.devices import run_command
from plainrl.figure_style import (
    PANEL_HEIGHT,
    PANEL_WIDTH,
    SEEDS_NOTE,
    draw_series,
    keep_possible,
    legend_height,
    new_figure,
    put_legend_below,
)
from plainrl.records import UserError
from plainrl.run_records import read_metrics
from plainrl.several_samples import sample_counts
from plainrl.shared_config import is_embedded

NAME = "pass_at_k"
QUANTITIES = {"pass": "pass@k (share of questions)", "majority": "maj@k (share of questions)"}
SETTINGS = ("num_questions", "num_samples", "temperature")  # the same for all runs of a figure
COLUMNS = (
    *("variant", "seed", "k", *SETTINGS),
    *(f"{quantity}{end}" for quantity in QUANTITIES for end in ("", "_low", "_high")),
)
Row = Mapping[str, str]


def main(arguments: list[str]) -> None:
    """Collect runs if any are named, then draw the figure and print the table."""
    require_one_process("pass_at_k")
    results, pairs = read_labels(arguments)
    if pairs:
        collect(pairs, results)
    if not write_figure_and_table(results, results):
        raise UserError(
            f"{results / NAME}/{NAME}.csv is not there; name runs to collect: {run_command(PASS_AT_K)} LABEL=RUN"
        )


def collect(runs: Sequence[tuple[str, Path]], results: Path) -> None:
    """Write the CSV file of some runs; an earlier one is replaced.

    Args:
        runs: label and folder of each, in the order in which they are shown.
        results: the folder of all results.

    Raises:
        UserError: a run has no such metrics, or runs differ in their questions, samples or temperature.
    """
    rows: list[dict[str, Any]] = []
    labels = [label for label, _ in runs]
    for place, (label, folder) in enumerate(runs):
        rows += [{"variant": label, "seed": labels[:place].count(label), **row} for row in read_run(folder)]
        for key in SETTINGS:
            if rows[-1][key] != rows[0][key]:
                raise UserError(
                    f"{key}: {rows[-1][key]:g} in {folder}, but {rows[0][key]:g} in {runs[0][1]}; evaluate both alike"
                )
        require_same_questions(folder, runs[0][1])
    path = results / NAME / f"{NAME}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, COLUMNS, [{key: as_text(value) for key, value in row.items()} for row in rows])
    print(f"written: {path}")


def read_run(folder: Path) -> list[dict[str, Any]]:
    """Return a run's pass@k and maj@k, a row for each k: of its last evaluation, on all questions if it has that.

    Raises:
        UserError: it is no run, or its evaluations have one sample per question.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run, for it has no config.yaml; name the folder of a run")
    settings = read_yaml(folder / "config.yaml")
    defaults = {key: SFTConfig.model_fields[key].default for key in ("num_eval_samples", "eval_sampling_temperature")}
    num_samples, own = (settings.get(key, default) for key, default in defaults.items())
    found = [
        (prefix, row)
        for prefix in ("eval", "eval_all")
        for row in read_metrics(folder)
        if row.get(f"{prefix}/pass_at_{num_samples}") is not None
    ]
    if num_samples == 1 or not found:
        raise UserError(f"{folder} has no pass@k: evaluate its model with num_eval_samples above 1")
    prefix, metrics = found[-1]
    of_run = {
        "num_questions": metrics[f"{prefix}/num_examples"],
        "num_samples": num_samples,
        "temperature": settings["sampling_temperature"] if own is None else own,
    }
    values = {
        k: {
            f"{quantity}{end}": metrics[f"{prefix}/{quantity}_at_{k}{end}"]
            for quantity in QUANTITIES
            for end in ("", "_low", "_high")
        }
        for k in sample_counts(num_samples)
    }
    return [{"k": k, **of_run, **of_k} for k, of_k in values.items()]


def require_same_questions(folder: Path, first: Path) -> None:
    """Raise a UserError if the validation questions of two runs are not drawn from the same data in the same way."""
    of_run, of_first = (questions_of(read_yaml(run / "config.yaml")) for run in (folder, first))
    for key in of_run | of_first:
        if of_run.get(key) != of_first.get(key):
            texts = [f"{'none' if values.get(key) is None else values[key]} in" for values in (of_run, of_first)]
            raise UserError(f"{key}: {texts[0]} {folder}, but {texts[1]} {first}; evaluate both alike")


def questions_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a run's settings that say which its validation questions are.

    >>> questions_of({"validation_data": "test.jsonl", "arithmetic_max_term": 10})
    {'validation_fraction': 0.0, 'validation_data': 'test.jsonl'}
    """
    values = with_defaults(settings, SFTConfig)
    source = "train_data" if values["validation_fraction"] else "validation_data"
    keys = ["validation_fraction", source, *(["validation_seed"] if values["validation_fraction"] else [])]
    if is_embedded(values[source]):
        keys += ["arithmetic_terms", "arithmetic_max_term"]
    return {key: values[key] for key in keys}


def write_figure_and_table(results: Path, output: Path, suffix: str = "") -> bool:
    """Draw the figure, print the table and put it into the README; return whether there are results.

    Args: as in `experiments.plot_results.write_all`.
    """
    rows = read_table(results / f"{NAME}{suffix}" / f"{NAME}.csv")
    if not rows:
        return False
    path = output / f"{NAME}{suffix}" / f"{NAME}.png"
    draw(rows, path)
    table = make_table(rows)
    print(f"drawn: {path}\n\n{NAME}{suffix}:\n{table}")
    readme = path.with_name("README.md")
    if readme.exists():
        readme.write_text(put_table(readme.read_text(), table))
    return True


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw pass@k and maj@k over k, a panel for each: a thin line for each run, a thick one for their mean."""
    by_label = _by_label(rows)
    ks = [int(k) for k in next(iter(by_label.values()))]
    height = len(QUANTITIES) * PANEL_HEIGHT + legend_height(list(by_label), PANEL_WIDTH)
    with new_figure(path, PANEL_WIDTH, height) as figure:
        grid = figure.subplots(len(QUANTITIES), 1)
        for axes, (quantity, label) in zip(grid, QUANTITIES.items(), strict=True):
            for number, (name, by_k) in enumerate(by_label.items()):
                columns = [_values(of_k, quantity) for of_k in by_k.values()]
                if all(columns):
                    runs = [list(zip(ks, of_run, strict=True)) for of_run in zip(*columns, strict=True)]
                    draw_series(axes, number, name, runs, list(zip(ks, map(fmean, columns), strict=True)))
            axes.set_xscale("log", base=2)
            axes.set_xticks(ks, [str(k) for k in ks])
            axes.set(xlabel="k, responses per question", ylabel=label)
            keep_possible(axes, 0.0, 1.0)
        put_legend_below(figure, grid[0], PANEL_WIDTH, SEEDS_NOTE if len(rows) > len(ks) * len(by_label) else "")


def make_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table: pass@k for every k, and maj@k for the largest, a line for each label.

    With several runs: their mean and its 95 % t-interval. With one: its interval over questions. A difference to the
    first line (Welch's 95 % interval) follows where both have several runs.
    """
    by_label = _by_label(rows)
    first = next(iter(by_label.values()))
    shown = [("pass", k) for k in first] + [("majority", list(first)[-1])]
    names = {"pass": "pass", "majority": "maj"}
    lines = [
        f"| policy | runs | {' | '.join(f'{names[quantity]}@{k}' for quantity, k in shown)} |",
        "|---" * (2 + len(shown)) + "|",
    ]
    for label, by_k in by_label.items():
        cells = [_cell(by_k[k], first[k], quantity) for quantity, k in shown]
        lines.append(f"| {label} | {len(next(iter(by_k.values())))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_label(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Return the rows by label and k, of each run one."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["variant"], {}).setdefault(row["k"], []).append(row)
    return found


def _values(rows: Sequence[Row], quantity: str) -> list[float]:
    return [float(row[quantity]) for row in rows if row[quantity]]


def _cell(rows: Sequence[Row], first: Sequence[Row], quantity: str) -> str:
    values, first_values = _values(rows, quantity), _values(first, quantity)
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3f} ({float(rows[0][f'{quantity}_low']):.3f} to {float(rows[0][f'{quantity}_high']):.3f})"
    cell = "{:.3f} +- {:.3f}".format(*mean_and_half_width(values))
    if rows is first or len(first_values) < 2:
        return cell
    return cell + "; {:+.3f} +- {:.3f}".format(*difference_and_half_width(values, first_values))


if __name__ == "__main__":
    run_main(main)
