"""Figures and tables: statistics and curves by hand, and what is committed agrees with the committed CSVs."""

import csv
import math
import shutil

import pytest
from tiny import REPOSITORY, tracked_files

from experiments import pass_at_k, plot_results, result_figures
from experiments.catalog import FIGURES, OF_DPO, TABLES
from experiments.curves import Curve, Group, Panel, points_by_step, read_series
from experiments.intervals import difference_and_half_width, mean_and_half_width
from experiments.result_figures import AXES, QUANTITIES, draw
from experiments.result_tables import START_OF_TABLE, make_methods_table, make_table, put_table
from experiments.sweep_figures import write_figures_and_table
from experiments.sweep_plan import read_sweep, variants_of
from experiments.sweep_results import METRIC_COLUMNS, RUN_COLUMNS, read_table
from plainrl.figure_style import draw_series, keep_possible, legend_height, num_legend_columns, smooth
from plainrl.records import UserError
from plainrl.run_records import EVAL_SCORE
from plainrl.several_samples import wilson_interval

RESULTS = REPOSITORY / "results"
CURVES = {
    curve
    for curves in [*TABLES.values(), *(group.curves for groups in FIGURES.values() for group in groups)]
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
    scores = read_series(BASELINE, Panel("rollout_batches", "eval/answer_reward"), results)
    assert scores.seeds == [[(0, 0.1), (1, 0.762), (2, 0.4)], [(0, 0.2), (1, 0.66), (2, 0.5)], [(0, 0.3), (1, 0.75)]]
    assert scores.mean == [(0, pytest.approx(0.2)), (1, pytest.approx(0.724))]
    losses = read_series(BASELINE, Panel("optimizer_steps", "train/loss"), results)
    assert losses.seeds == [[(1, 1), (2, 2)]] * 3 and losses.mean == [(1, 1), (2, 2)]
    by_tokens = Panel("sampled_tokens", "eval/answer_reward")
    assert read_series(BASELINE, by_tokens, results) == ([], [])  # it sampled nothing
    absent = BASELINE._replace(variant="learning_rate=3e-05")
    assert read_series(absent, Panel("optimizer_steps", "train/loss"), results) == ([], [])


def test_minutes_are_the_median_of_the_seeds(results):
    """Steps of one, two and three minutes, and evaluations, which do not count."""
    by_minutes = read_series(BASELINE, Panel("minutes", "eval/answer_reward"), results)
    assert by_minutes.mean == [(0, pytest.approx(0.2)), (4, pytest.approx(0.724))]
    assert by_minutes.seeds == [[(0, 0.1), (4, 0.762)], [(0, 0.2), (4, 0.66)], [(0, 0.3), (4, 0.75)]]


def test_sampled_tokens_so_far_are_the_share_of_the_response_lengths_so_far():
    rows = [{"train_step": step, "rollout/response_length": length} for step, length in ((1, 30), (2, 10))]
    rows.insert(0, {"eval_step": 0, "eval/answer_reward": 0.1})
    rows.insert(2, {"eval_step": 1, "eval/answer_reward": 0.2})
    rows.append({"eval_step": 2, "eval/answer_reward": 0.4})
    rows = [dict.fromkeys(METRIC_COLUMNS, "") | {key: str(value) for key, value in row.items()} for row in rows]
    panel = Panel("sampled_tokens", "eval/answer_reward")
    points = points_by_step(rows, panel, {"sampled_tokens": "320"})
    assert points == {0: (0, 0.1), 1: (0.24, 0.2), 2: (0.32, 0.4)}  # thousands


def test_rollout_batches_are_counted_where_each_has_several_updates():
    rows = [{"eval_step": "0", "train_step": "", "eval/answer_reward": "0.1"}]
    rows += [
        {"train_step": str(step), "train/grad_norm": "1", "rollout/reward": "0.5" * (step % 2 == 0)}
        for step in (1, 2, 3, 4)
    ]
    rows += [{"eval_step": "2", "train_step": "", "eval/answer_reward": "0.3"}]
    rows, run = [dict.fromkeys(METRIC_COLUMNS, "") | row for row in rows], {"sampled_tokens": "0"}
    assert points_by_step(rows, Panel("rollout_batches", "rollout/reward"), run) == {2: (1, 0.5), 4: (2, 0.5)}
    of_evaluations = points_by_step(rows, Panel("rollout_batches", EVAL_SCORE), run)
    assert of_evaluations == {0: (0, 0.1), 2: (2, 0.3)}


def lines_in(axes):
    return [(list(line.get_xdata()), list(line.get_ydata()), line.get_linewidth()) for line in axes.lines]


@pytest.fixture
def axes():
    from matplotlib.figure import Figure

    return Figure().add_subplot()


def test_each_seed_is_a_thin_line_and_the_mean_a_thick_one(axes):
    draw_series(axes, 0, "two seeds", [[(0, 0.0), (1, 0.2)], [(0, 0.0), (1, 0.6)]], [(0, 0.0), (1, 0.4)])
    (*thin, thick) = lines_in(axes)
    assert [line[:2] for line in thin] == [([0, 1], [0.0, 0.2]), ([0, 1], [0.0, 0.6])]
    assert thick[:2] == ([0, 1], [0.0, 0.4]) and thick[2] > max(line[2] for line in thin)
    assert not axes.collections, "no bands"
    assert axes.get_legend_handles_labels()[1] == ["two seeds"]


def test_a_smoothed_line_shows_its_raw_values_too(axes):
    draw_series(axes, 0, "raw", [[(1, 4.0), (2, 2.0), (3, 0.0)]])
    assert [line[1] for line in lines_in(axes)] == [[4.0, 2.0, 0.0]]
    draw_series(axes, 1, "smoothed", [[(1, 4.0), (2, 2.0), (3, 0.0)]], window=2)
    assert [line[1] for line in lines_in(axes)[1:]] == [[4.0, 2.0, 0.0], [4.0, 3.0, 1.0]]
    assert smooth([1.0, 2.0, 6.0], window=1) == [1.0, 2.0, 6.0]


def test_axes_end_where_the_possible_values_end(axes):
    axes.plot([0, 1], [0.0, 1.0])
    keep_possible(axes, 0.0, 1.0)
    bottom, top = axes.get_ylim()
    assert -0.03 < bottom < 0 and 1 < top < 1.03
    axes.set_ylim(0.4, 0.7)  # never wider than it was
    keep_possible(axes, 0.0, 1.0)
    assert axes.get_ylim() == (0.4, 0.7)


def test_a_legend_has_as_many_columns_as_fit():
    assert num_legend_columns(["short"] * 3, 5.4) == 3
    assert num_legend_columns(["x" * 40, "short"], 5.4) == 1
    assert legend_height(["x" * 40, "short"], 5.4) > legend_height(["short"], 5.4)


def test_every_panel_has_an_axis_with_quantity_and_unit():
    panels = [panel for groups in FIGURES.values() for group in groups for panel in group.panels]
    assert {panel.axis for panel in panels} == set(AXES)
    assert {panel.metric for panel in panels} | set(OF_DPO) == set(QUANTITIES)  # a sweep of one's own shows DPO's


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
    assert make_methods_table(results).splitlines()[2:] == [
        "| [untrained (zero-shot)](results/zero_shot) | 0.000 (0.000 to 0.004) | 1 | 1,024 | 1.9 |",
        "| [GRPO from the warm start, 24 steps, no further traces](results/grpo_learning_rate) | 0.700 +- 0.000 "
        "| 3 | 1,024 | 6.0 |",
    ]


def test_a_table_by_hand(results):
    lines = make_table(BASELINE.sweep, [BASELINE, BASELINE._replace(variant="other")], results).splitlines()
    assert len(lines) == 3 and lines[0].startswith("| variant | last | best | ") and lines[1].count("---") == 10
    assert lines[2] == (
        "| two | 0.724 +- 0.138 | 0.500 +- 0.000 | 0.500 +- 0.000 (n = 2) | - | 3 | 256 | 10, - | 0.237 to 0.763 "
        "| 20.0 |"
    )


def test_a_reward_of_ones_own_has_no_wilson_interval(results):
    path = results / f"{BASELINE.sweep}/runs.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for reward in (-0.5, 1.5, 0.3):  # 0.3 is no share of 256
        write_csv(path, RUN_COLUMNS, [row | {"last_answer_reward": reward, "final_answer_reward": ""} for row in rows])
        assert make_table(BASELINE.sweep, [BASELINE], results).splitlines()[2].split(" | ")[-2] == "-"


def test_a_method_whose_runs_asked_nothing_has_no_line(results):
    assert len(make_methods_table(results).splitlines()) == 3
    path = results / f"{BASELINE.sweep}/runs.csv"
    rows = [row | {"last_answer_reward": "", "final_answer_reward": ""} for row in read_table(path)]
    write_csv(path, RUN_COLUMNS, rows)
    assert len(make_methods_table(results).splitlines()) == 2


def test_axes_are_not_cut_where_scores_are_no_shares(results, tmp_path, monkeypatch):
    """A reward of one's own may be negative."""
    kept = []
    monkeypatch.setattr(result_figures, "keep_possible", lambda axes, low, high: kept.append((low, high)))
    group = Group("own reward", [BASELINE], [Panel("rollout_batches", EVAL_SCORE)])
    path = results / f"{BASELINE.sweep}/metrics.csv"
    for change in (0.0, -0.5):
        rows = [row | {EVAL_SCORE: row[EVAL_SCORE] and float(row[EVAL_SCORE]) + change} for row in read_table(path)]
        write_csv(path, METRIC_COLUMNS, rows)
        assert result_figures.draw([group], results, tmp_path / "own.png")
    assert kept == [(0.0, 1.0)]


def test_a_variant_that_the_catalog_does_not_know_is_in_the_table_and_said(results, capsys):
    folder = results / BASELINE.sweep
    row = {"variant": "learning_rate=3e-05", "seed": 0, "last_answer_reward": 0.5, "num_eval_examples": 256}
    write_csv(folder / "runs.csv", RUN_COLUMNS, [*read_table(folder / "runs.csv"), row])
    write_figures_and_table(folder, BASELINE.sweep)
    assert "| learning_rate=3e-05 | 0.500 |" in (folder / "README.md").read_text()
    assert "not in the figures of experiments/catalog.py: learning_rate=3e-05" in capsys.readouterr().out


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
    # What only borrows the baseline waits for its own.
    assert drawn == {"RL-eval-reward.png", "grpo_learning_rate/learning-rates.png"}
    output = capsys.readouterr().out
    assert "grpo_learning_rate:\n| variant |" in output and "\ngrpo_ablation:" not in output
    assert "GRPO-eval-reward.png: skipped, no results yet of grpo_off_policy on_policy, " in output
    assert "SFT-train-loss.png: skipped, no results yet of sft_examples num_sft_examples=128, " in output
    assert "RL-eval-reward.png: no results yet of grpo_learning_rate learning_rate=5e-06, " in output
    plot_results.write_all(results, results)
    assert readme.read_text() == text


def test_a_figure_that_only_borrows_the_on_policy_run_waits_for_its_own(results, capsys):
    for name in ("metrics.csv", "runs.csv"):
        text = (results / "grpo_learning_rate" / name).read_text().replace("learning_rate=2e-05", "on_policy")
        (results / "grpo_off_policy").mkdir(exist_ok=True)
        (results / "grpo_off_policy" / name).write_text(text)
    path = results / "prompt/prompts.png"
    assert not draw(FIGURES["prompt/prompts.png"], results, path)
    assert f"{path}: skipped, no results yet of prompt question_only" in capsys.readouterr().out and not path.exists()


def test_few_seeds_are_said(results, capsys):
    path = results / "grpo_learning_rate/metrics.csv"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "05,2," not in line) + "\n")
    assert draw(FIGURES["RL-eval-reward.png"], results, results / "figure.png")
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
    sweeps = tracked_files("experiments/sweeps/*.yaml")
    assert len(sweeps) >= 17
    for path in sweeps:
        named = {curve.variant for curve in CURVES if curve.sweep == path.stem}
        assert named == set(variants_of(read_sweep(path))), path


def test_committed_tables_agree_with_the_committed_results():
    for path in tracked_files("results/*/README.md"):
        text = path.read_text()
        if START_OF_TABLE in text:
            experiment, dash, preset = path.parent.name.partition("-")
            if experiment == pass_at_k.NAME:
                table = pass_at_k.make_table(read_table(path.with_name("pass_at_k.csv")))
            else:
                table = make_table(experiment, TABLES[experiment], RESULTS, dash + preset)
            assert table and put_table(text, table) == text, f"{path}: run plot_results.py"


def test_the_committed_methods_table_agrees_with_the_committed_results():
    text = (REPOSITORY / "README.md").read_text()
    assert START_OF_TABLE in text
    assert put_table(text, make_methods_table(RESULTS)) == text, "README.md: run plot_results.py"


def test_committed_figures_are_those_that_have_results(tmp_path):
    plot_results.write_all(RESULTS, tmp_path)
    committed = {name for name in (*FIGURES, "pass_at_k/pass_at_k.png") if (RESULTS / name).exists()}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")} == committed
