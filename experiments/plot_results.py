"""Draw every figure and write every table of results/ from the committed CSVs.

    uv run python -m experiments.plot_results [preset=one-gpu]

The catalog (catalog.py) says which there are. What has no CSV yet is skipped, and named. `preset=one-gpu` draws the
results of the sweeps that ran with that preset.

Figures: a thin line is one seed, a thick line the mean over seeds at the steps that all of them have. Tables (see
result_tables.py) are printed, and written between the two marks of results/<experiment>/README.md. README.md has a
table of its own, of the laptop preset, with one line per method.
"""

from pathlib import Path

from experiments import pass_at_k
from experiments.catalog import FIGURES, TABLES
from experiments.result_figures import draw
from experiments.result_tables import make_methods_table, make_table, put_table
from plainrl.cli import require_one_process, run_main
from plainrl.devices import run_command
from plainrl.records import UserError


def main(arguments: list[str]) -> None:
    """Draw every figure, write every table."""
    require_one_process("plot_results")
    key, _, preset = (arguments or ["preset=laptop"])[0].partition("=")
    if len(arguments) > 1 or key != "preset" or not preset:
        raise UserError(f"usage: {run_command('python -m experiments.plot_results')} [preset=one-gpu]")
    readme = Path("README.md")
    if not readme.is_file():
        raise UserError("README.md is not here: run this from the root of the repository")
    write_all(Path("results"), Path("results"), "" if preset == "laptop" else f"-{preset}")
    readme.write_text(put_table(readme.read_text(), make_methods_table(Path("results"))))


def write_all(results: Path, output: Path, suffix: str = "") -> None:
    """Draw all figures and write all tables that have results.

    Args:
        results: the folder with the folders of the sweeps.
        output: the folder of the figures, and of the READMEs' folders.
        suffix: what follows the name of a sweep, a figure and a README's folder, such as -one-gpu.
    """
    for name, groups in FIGURES.items():
        path = output / name
        if draw(groups, results, path.with_stem(path.stem + suffix), suffix):
            print(f"drawn: {path.with_stem(path.stem + suffix)}")
    for experiment, curves in TABLES.items():
        table = make_table(experiment, curves, results, suffix)
        path = output / f"{experiment}{suffix}" / "README.md"
        if table:
            print(f"\n{experiment}{suffix}:\n{table}")
        if table and path.exists():
            path.write_text(put_table(path.read_text(), table))
    pass_at_k.write_figure_and_table(results, output, suffix)


if __name__ == "__main__":
    run_main(main)
