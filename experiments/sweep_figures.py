"""The figure and the table of one sweep, drawn when it ends, from its committed CSVs alone.

A sweep of the catalog gets its figures and labels from there. Any other one gets results/<sweep>/<sweep>.png, with a
curve for each variant, and a README.md with a table. What stands in that README beside the table is yours.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.catalog import ENTROPY, FIGURES, LOSS, OF_DPO, TABLES
from experiments.curves import Curve, Group, Panel, read_series, rows_of
from experiments.result_figures import draw
from experiments.result_tables import END_OF_TABLE, START_OF_TABLE, make_table, put_table
from experiments.sweep_results import read_table
from plainrl.run_records import EVAL_SCORE


def write_figures_and_table(results: Path, sweep: str) -> None:
    """Draw the figures of a sweep that has results, and put its table into results/<sweep>/README.md.

    Args:
        results: the folder of the sweep's results.
        sweep: its name; that of the folder may have a preset behind it.
    """
    root, suffix = results.parent, results.name.removeprefix(sweep)
    variants = list(dict.fromkeys(row["variant"] for row in read_table(results / "runs.csv")))
    if not variants:
        return
    known = TABLES.get(sweep, [])
    new = [variant for variant in variants if (sweep, variant) not in {(c.sweep, c.variant) for c in known}]
    curves = [*known, *(Curve(sweep, variant, variant) for variant in new)]
    if known and new:
        print(f"in the table, and not in the figures of experiments/catalog.py: {', '.join(new)}")
    figures = {
        name: groups for name, groups in FIGURES.items() if any(sweep == c.sweep for g in groups for c in g.curves)
    }
    if sweep not in TABLES:
        figures = own_figure(sweep, curves, root, suffix)
    for name, groups in figures.items():
        path = (root / name).with_stem(Path(name).stem + (suffix if sweep in TABLES else ""))
        if draw(groups, root, path, suffix):
            print(f"drawn: {path}")
    readme = results / "README.md"
    if not readme.exists():
        shown = [f"![curves]({Path(name).name})" for name in figures if sweep not in TABLES]
        readme.write_text("\n\n".join([f"# {results.name}", f"{START_OF_TABLE}\n{END_OF_TABLE}", *shown]) + "\n")
    table = make_table(sweep, curves, root, suffix)
    readme.write_text(put_table(readme.read_text(), table))
    print(f"table: {readme}\n{table}")


def own_figure(sweep: str, curves: Sequence[Curve], root: Path, suffix: str) -> dict[str, list[Group]]:
    """Return the figure of a sweep that is not in the catalog, by its path; nothing if no curve has two points."""
    rows = [row for curve in curves for row in rows_of(curve, root, suffix, "metrics.csv")]
    if any(row["rollout/reward"] for row in rows):
        panels = [Panel("rollout_batches", EVAL_SCORE), Panel("minutes", EVAL_SCORE), Panel("rollout_batches", ENTROPY)]
        panels.append(Panel("rollout_batches", "eval/response_length"))
    else:
        panels = [Panel("optimizer_steps", metric) for metric in (LOSS, EVAL_SCORE, *OF_DPO)]
    found = {panel: [read_series(curve, panel, root, suffix).mean for curve in curves] for panel in panels}
    drawn = [panel for panel, lines in found.items() if any(len(line) > 1 for line in lines)]
    name = f"{sweep}{suffix}"
    return {f"{name}/{name}.png": [Group(name, curves, drawn)]} if drawn else {}
