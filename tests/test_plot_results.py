"""Figures and tables: statistics and curves by hand, and what is committed agrees with the committed CSVs."""

import csv
import math
import shutil

import pytest
from tiny import REPOSITORY

import plot_results
from plot_results import (
    Curve,
    Panel,
    Point,
    difference_and_half_width,
    make_table,
    mean_and_half_width,
    put_table,
    read_curve,
    wilson_interval,
)
from run_config import UserError
from run_results import METRIC_COLUMNS, RUN_COLUMNS
from sweep import read_sweep, variants_of

RESULTS = REPOSITORY / "results"
CURVES = {
    curve
    for curves in [*plot_results.TABLES.values(), *(p.curves for ps in plot_results.FIGURES.values() for p in ps)]
    for curve in curves
}


def write_csv(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def results(tmp_path):
    """Three seeds of one variant of the learning-rate sweep, one of them without an evaluation after step 2."""
    names = {"variant": "learning_rate=2e-05"}
    metrics, runs = [], []
    for seed, scores in enumerate([(0.1, 0.762, 0.4), (0.2, 0.66, 0.5), (0.3, 0.75, None)]):
        row = names | {"seed": seed}
        metrics.append(row | {"eval_step": 0, "eval/answer_reward": scores[0], "eval/seconds": 100})
        metrics += [row | {"train_step": step, "time/step": 60 * (seed + 1), "train/loss": step} for step in (1, 2)]
        metrics.append(row | {"eval_step": 1, "eval/answer_reward": scores[1]})
        if scores[2]:
            metrics.append(row | {"eval_step": 2, "eval/answer_reward": scores[2]})
        row |= {"last_answer_reward": scores[1], "best_answer_reward": 0.5, "num_eval_examples": 256, "minutes": 20}
        runs.append(row | ({"final_answer_reward": 0.5, "num_final_examples": 10} if seed < 2 else {}))
    write_csv(tmp_path / "results/grpo_learning_rate/metrics.csv", METRIC_COLUMNS, metrics)
    write_csv(tmp_path / "results/grpo_learning_rate/runs.csv", RUN_COLUMNS, runs)
    return tmp_path / "results"


BASELINE = Curve("grpo_learning_rate", "learning_rate=2e-05", "two")


def test_intervals_by_hand():
    assert mean_and_half_width([1, 2, 3]) == (2, pytest.approx(4.302653 / math.sqrt(3)))  # s = 1
    assert mean_and_half_width([4, 8]) == (6, pytest.approx(12.706205 * 2))  # s = sqrt(8)
    assert mean_and_half_width([0.762, 0.66, 0.75]) == (pytest.approx(0.724), pytest.approx(0.1385, abs=1e-4))
    assert mean_and_half_width([0.5]) == (0.5, 0)
    # z^2 = 3.8415: (0.5 + 0.19207 -+ 1.96 sqrt(0.025 + 0.0096036)) / 1.38415
    # Welch by hand: 0.2 +- t(0.975, 2.94) sqrt(0.01 / 3 + 0.04 / 3), t between those of 2 and 3 degrees of freedom
    mean, half = difference_and_half_width([0.5, 0.7, 0.9], [0.4, 0.5, 0.6])
    assert mean == pytest.approx(0.2) and 3.1824 < half / math.sqrt(0.05 / 3) < 4.3027
    assert difference_and_half_width([0.5, 0.5], [0.25, 0.25]) == (0.25, 0)
    assert wilson_interval(0.5, 10) == (pytest.approx(0.23659, abs=1e-5), pytest.approx(0.76341, abs=1e-5))
    assert wilson_interval(0, 10) == (pytest.approx(0), pytest.approx(3.8415 / 13.8415, abs=1e-5))


def test_a_curve_is_the_mean_over_seeds_where_all_have_the_step(results):
    points, num_seeds = read_curve(BASELINE, Panel("", "eval_step", "eval/answer_reward", []), results)
    half_widths = [4.302653 * 0.1 / math.sqrt(3), 0.1385]
    assert num_seeds == 3
    assert points == [
        Point(0, pytest.approx(0.2), pytest.approx(half_widths[0])),
        Point(1, pytest.approx(0.724), pytest.approx(half_widths[1], abs=1e-4)),
    ]
    by_minutes, _ = read_curve(BASELINE, Panel("", "minutes", "eval/answer_reward", []), results)
    assert [point.x for point in by_minutes] == [0, pytest.approx(4)]
    losses, _ = read_curve(BASELINE, Panel("", "train_step", "train/loss", []), results)
    assert losses == [Point(1, 1, 0), Point(2, 2, 0)]
    by_tokens = Panel("", "sampled_tokens", "eval/answer_reward", [])
    assert read_curve(BASELINE, by_tokens, results) == ([], 0)  # it has sampled nothing
    absent = BASELINE._replace(variant="learning_rate=3e-05")
    assert read_curve(absent, Panel("", "train_step", "train/loss", []), results) == ([], 0)


def test_sampled_tokens_so_far_are_the_share_of_the_response_lengths_so_far():
    rows = [{"train_step": step, "rollout/response_length": length} for step, length in ((1, 30), (2, 10))]
    rows.insert(0, {"eval_step": 0, "eval/answer_reward": 0.1})
    rows.insert(2, {"eval_step": 1, "eval/answer_reward": 0.2})
    rows.append({"eval_step": 2, "eval/answer_reward": 0.4})
    rows = [dict.fromkeys(METRIC_COLUMNS, "") | {key: str(value) for key, value in row.items()} for row in rows]
    panel = Panel("", "sampled_tokens", "eval/answer_reward", [])
    points = plot_results._by_step(rows, panel, {"sampled_tokens": "320"})
    assert points == {0: (0, 0.1), 1: (240, 0.2), 2: (320, 0.4)}


def test_the_methods_table_by_hand(results):
    write_csv(
        results / "zero_shot/runs.csv",
        RUN_COLUMNS,
        [{"variant": "r1_zero", "seed": 0, "last_answer_reward": 0, "num_eval_examples": 1024, "wall_minutes": 1.87}],
    )
    path = results / "grpo_learning_rate/runs.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    finals = {"final_answer_reward": 0.7, "num_final_examples": 1024}
    write_csv(path, RUN_COLUMNS, [row | finals | {"wall_minutes": 5 + int(row["seed"]) ** 2} for row in rows])
    assert plot_results.make_methods_table(results).splitlines()[2:] == [
        "| untrained (zero-shot) | 0.000 (0.000 to 0.004) | 1 | 1,024 | 1.9 |",
        "| GRPO from the warm start, 24 steps, no further traces | 0.700 +- 0.000 | 3 | 1,024 | 6.0 |",
    ]


def test_a_table_by_hand(results):
    lines = make_table(BASELINE.sweep, [BASELINE, BASELINE._replace(variant="other")], results).splitlines()
    assert len(lines) == 3 and lines[0].startswith("| variant | last | best | ") and lines[1].count("---") == 10
    assert lines[2] == (
        "| two | 0.724 +- 0.138 | 0.500 +- 0.000 | 0.500 +- 0.000 (n = 2) | - | 3 | 256 | 10, - | 0.237 to 0.763 "
        "| 20.0 |"
    )


def test_all_is_drawn_and_written_that_has_results_and_the_rest_is_named(results, tmp_path, capsys):
    readme = results / "grpo_learning_rate" / "README.md"
    readme.write_text("# T\n<!-- table -->\nold\n<!-- end of table -->\nafter\n")
    (results / "grpo_ablation").mkdir()
    (results / "grpo_ablation/README.md").write_text("no marks\n")
    plot_results.write_all(results, results)
    text = readme.read_text()
    assert "old" not in text and text.startswith("# T\n<!-- table -->\n| variant |") and text.endswith("\nafter\n")
    assert (results / "grpo_ablation/README.md").read_text() == "no marks\n"
    drawn = {str(path.relative_to(results)) for path in results.rglob("*.png")}
    assert drawn == {"RL-eval-reward.png"}  # what only borrows the baseline waits for its own
    output = capsys.readouterr().out
    assert "grpo_learning_rate:\n| variant |" in output and "\ngrpo_ablation:" not in output
    assert "GRPO-eval-reward.png: skipped, no results yet of grpo_off_policy on_policy, " in output
    assert "SFT-train-loss.png: skipped, no results yet of sft_examples num_sft_examples=128, " in output
    assert "RL-eval-reward.png: no results yet of grpo_learning_rate learning_rate=5e-06, " in output
    plot_results.write_all(results, results)
    assert readme.read_text() == text


def test_few_seeds_are_said(results, capsys):
    path = results / "grpo_learning_rate/metrics.csv"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "05,2," not in line) + "\n")
    assert plot_results.draw(plot_results.FIGURES["RL-eval-reward.png"], results, results / "figure.png")
    assert "learning_rate=2e-05 has 2 of at least 3 seeds" in capsys.readouterr().out


def test_other_presets_have_their_own_files(results):
    shutil.move(results / "grpo_learning_rate", results / "grpo_learning_rate-one-gpu")
    plot_results.write_all(results, results, "-one-gpu")
    assert (results / "RL-eval-reward-one-gpu.png").exists() and not (results / "RL-eval-reward.png").exists()


@pytest.mark.parametrize("arguments", [["one-gpu"], ["preset="], ["preset=a", "preset=b"], ["seed=1"]])
def test_mistakes_on_the_command_line(arguments):
    with pytest.raises(UserError, match="usage: "):
        plot_results.main(arguments)


def test_curves_and_sweep_files_name_the_same_variants():
    for path in (REPOSITORY / "sweeps").glob("*.yaml"):
        named = {curve.variant for curve in CURVES if curve.sweep == path.stem}
        assert named == set(variants_of(read_sweep(path))), path


def test_committed_tables_agree_with_the_committed_results():
    for path in RESULTS.glob("*/README.md"):
        text = path.read_text()
        if plot_results.START_OF_TABLE in text:
            experiment, dash, preset = path.parent.name.partition("-")
            table = make_table(experiment, plot_results.TABLES[experiment], RESULTS, dash + preset)
            assert table and put_table(text, table) == text, f"{path}: run plot_results.py"


def test_the_committed_methods_table_agrees_with_the_committed_results():
    text = (REPOSITORY / "README.md").read_text()
    assert plot_results.START_OF_TABLE in text
    assert put_table(text, plot_results.make_methods_table(RESULTS)) == text, "README.md: run plot_results.py"


def test_committed_figures_are_those_that_have_results(tmp_path):
    plot_results.write_all(RESULTS, tmp_path)
    committed = {name for name in plot_results.FIGURES if (RESULTS / name).exists()}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")} == committed
