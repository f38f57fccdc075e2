"""The sweep: its files, and its states, collecting and stopping with a script that only writes what a run would."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from tiny import REPOSITORY, tracked_files

from experiments import sweep, sweep_plan
from experiments.curves import Curve
from experiments.sweep_figures import own_figure, write_figures_and_table
from experiments.sweep_plan import plan
from experiments.sweep_results import METRIC_COLUMNS, RUN_COLUMNS, collect_run, forget_run, read_table
from experiments.usage import plan_sweep
from plainrl.cli import load_config
from plainrl.config import GRPOConfig
from plainrl.devices import run_command
from plainrl.records import UserError
from plainrl.run_folder import lock_folder, state_at_rest

# token_mean fails, masked_normalize waits for a signal in its first session, the others end well
FAKE_SCRIPT = """
import json, signal, sys, time
from pathlib import Path
import yaml
values = dict(argument.split("=", 1) for argument in sys.argv[1:])
assert values.pop("resume") == "auto"
folder = Path(values.get("runs_dir", "runs")) / values["run_name"]
if (folder / "final").is_dir():
    sys.exit("error: finished already")
is_resumed = (folder / "checkpoints").is_dir()
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
settings = json.loads(Path("preset.json").read_text()) | {key: yaml.safe_load(text) for key, text in values.items()}
(folder / "config.yaml").write_text(yaml.safe_dump(settings))
print("a line of output")
if values.get("length_normalization") == "token_mean":
    sys.exit("error: it failed")
if values.get("length_normalization") == "masked_normalize" and not is_resumed:
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").write_text("once"), sys.exit(143)))
    (folder / "ready").write_text("")
    time.sleep(60)
rows = [
    {"eval_step": 0, "eval/answer_reward": 0.123456789, "eval/num_examples": 8, "eval/seconds": 30.0},
    {"train_step": 1, "train/loss": None, "rollout/response_length": 10.5, "time/step": 60.0, "memory/peak_gib": 2.0},
    {"train_step": 2, "train/loss": 0.5, "rollout/response_length": 11.0, "time/step": 60.0, "memory/peak_gib": 3.5},
    {"train_step": 3, "train/learning_rate": 0.5},
    {"eval_step": 1, "eval/answer_reward": 0.5, "eval/num_examples": 8, "eval/seconds": 30.0},
    {"eval_step": 2, "eval/answer_reward": 0.25, "eval/num_examples": 8, "eval/seconds": 30.0},
    {"eval_step": 2, "eval_all/answer_reward": 0.375, "eval_all/num_examples": 16, "eval_all/seconds": 30.0},
]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
for step in (1, 2):  # that of step 1 scored best
    (folder / f"checkpoints/step_00000{step}/model").mkdir(parents=True)
    (folder / f"checkpoints/step_00000{step}/model/weights").write_text(str(step))
(folder / "final").mkdir()
(folder / "final/weights").write_text("2")
"""
VARIANTS = {"b": {"epochs_per_rollout_batch": 2}, "a": {"use_std_normalization": False}}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a script that only looks like GRPO_train.py, and a sweep file of two variants and two seeds."""
    (tmp_path / "GRPO_train.py").write_text(FAKE_SCRIPT)
    of_preset = load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", ["preset=laptop"]).model_dump(mode="json")
    (tmp_path / "preset.json").write_text(json.dumps(of_preset))
    shutil.copy(REPOSITORY / "grpo_train.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_plan, "REPOSITORY", tmp_path)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sweep, "write_figures_and_table", lambda *_: None)  # it takes seconds
    write_sweep()
    return tmp_path


def write_sweep(variants=VARIANTS, **values):
    values = {"script": "GRPO_train.py", "seeds": [0, 1], "minutes": 30, "variants": variants} | values
    Path("mine.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def run_sweep(*arguments):
    sweep.main(["mine.yaml", "preset=laptop", *arguments])


def test_a_sweep_runs_collects_and_is_then_finished_without_its_runs(workplace, capsys):
    run_sweep()
    rows = read_table(Path("results/mine/runs.csv"))
    assert [(row["variant"], row["seed"]) for row in rows] == [("b", "0"), ("b", "1"), ("a", "0"), ("a", "1")]
    first = rows[0]
    assert tuple(first) == RUN_COLUMNS
    assert 0 < float(first.pop("wall_minutes")) < 0.5
    assert re.fullmatch("[0-9a-f]{12}-[0-9a-f]{12}", first.pop("fingerprint"))
    assert first == {
        **{"variant": "b", "seed": "0", "minutes": "4", "train_steps": "3", "peak_memory_gib": "3.5"},  # 240 seconds
        **{"last_answer_reward": "0.25", "best_answer_reward": "0.5", "num_eval_examples": "8"},
        **{"final_answer_reward": "0.375", "num_final_examples": "16", "sampled_tokens": "2752"},  # 21.5 x 128
    }
    metrics = read_table(Path("results/mine/metrics.csv"))
    assert tuple(metrics[0]) == METRIC_COLUMNS
    assert len(metrics) == 4 * 6  # the row with a learning rate alone has nothing that a figure needs
    assert (metrics[0]["eval_step"], metrics[0]["train_step"], metrics[0]["eval/answer_reward"]) == ("0", "", "0.12346")
    assert {path.name for path in Path("runs").glob("*/final/*")} == {"removed.txt"}
    assert not any(Path("runs").glob("*/checkpoints"))
    assert Path("runs/mine-b-seed0.log").read_text().startswith("sweep: started\na line of output\n")

    shutil.rmtree("runs")
    before = Path("results/mine/metrics.csv").read_bytes()
    capsys.readouterr()
    run_sweep()
    assert "0 of 4 runs to go" in capsys.readouterr().out
    assert not Path("runs").exists() and Path("results/mine/metrics.csv").read_bytes() == before


def test_dry_run_prints_states_and_time_and_runs_nothing(workplace, capsys):
    run_sweep("seeds=[1]")
    Path("runs/mine-a-seed0").mkdir()
    of_preset = json.loads(Path("preset.json").read_text())
    Path("runs/mine-a-seed0/config.yaml").write_text(yaml.safe_dump(of_preset | {"use_std_normalization": False}))
    capsys.readouterr()
    run_sweep("--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:4]] == [f"mine-{v}-seed{s}" for s in (0, 1) for v in ("b", "a")]
    assert [line.split("  ")[0] for line in lines[:4]] == ["to do", "interrupted", "finished", "finished"]
    assert "2 of 4 runs to go, about 1.0 hours" in lines[4]
    assert not Path("runs/mine-b-seed0").exists()


def test_one_variant_alone_is_run(workplace, capsys):
    run_sweep("--variant", "a")
    assert [(row["variant"], row["seed"]) for row in read_table(Path("results/mine/runs.csv"))] == [
        ("a", "0"),
        ("a", "1"),
    ]
    with pytest.raises(UserError, match="--variant c: .*mine.yaml has b a"):
        run_sweep("--variant", "c")


def weights_in(folder):
    return {str(path.parent.relative_to(folder)): path.read_text() for path in folder.rglob("weights")}


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        ("none", {}),
        ("last", {"final": "2"}),
        ("best", {"best": "1"}),
        ("all", {"final": "2", "checkpoints/step_000001/model": "1", "checkpoints/step_000002/model": "2"}),
    ],
)
def test_weights_are_kept_where_asked_for(workplace, capsys, kept, left):
    run_sweep(f"keep_weights={kept}", "seeds=[0]", "--variant", "a")
    assert weights_in(Path("runs/mine-a-seed0")) == left
    assert state_at_rest(Path("runs/mine-a-seed0")) == "finished"
    assert f"weights of finished runs: {sweep.KEPT[kept]}" in capsys.readouterr().out


def test_the_best_checkpoint_is_by_the_measure_of_the_script(workplace, monkeypatch):
    """DPO's is the accuracy on held-out pairs, which was best at step 2; the answer reward was best at step 1."""
    accuracies = (
        'for row, accuracy in zip((rows[0], rows[4], rows[5]), (0.5, 0.6, 0.7)): row["eval/accuracy"] = accuracy'
    )
    Path("DPO_train.py").write_text(FAKE_SCRIPT.replace('(folder / "metrics', f'{accuracies}\n(folder / "metrics', 1))
    program = sweep_plan.PROGRAMS[sweep_plan.SCRIPTS["DPO_train.py"]]
    monkeypatch.setitem(sweep_plan.PROGRAMS, "DPO_train.py", program)
    monkeypatch.setitem(sweep_plan.SCRIPTS, "DPO_train.py", "DPO_train.py")
    (workplace / "supplement").mkdir()
    shutil.copy(REPOSITORY / "supplement/dpo_train.yaml", workplace / "supplement")
    write_sweep({"a": {}}, script="DPO_train.py", seeds=[0])
    run_sweep("keep_weights=best")
    assert weights_in(Path("runs/mine-a-seed0")) == {"best": "2"}


def test_a_best_checkpoint_of_before_is_replaced(workplace):
    run_sweep("keep_weights=all", "seeds=[0]", "--variant", "a")
    shutil.copytree("runs/mine-a-seed0/final", "runs/mine-a-seed0/best")
    shutil.rmtree("results")
    run_sweep("keep_weights=best", "seeds=[0]", "--variant", "a")
    assert weights_in(Path("runs/mine-a-seed0")) == {"best": "1"}


def test_a_sweep_file_may_keep_weights_and_the_command_line_counts_more(workplace):
    write_sweep(keep_weights="best")
    assert plan(Path("mine.yaml"), ["preset=laptop"])[1][0].keep_weights == "best"
    assert plan(Path("mine.yaml"), ["preset=laptop", "keep_weights=none"])[1][0].keep_weights == "none"
    with pytest.raises(UserError, match="keep_weights = first: use one of none, last, best, all"):
        run_sweep("keep_weights=first")


def test_without_a_checkpoint_that_was_evaluated_final_is_kept_and_that_is_said(workplace, capsys):
    script = Path("GRPO_train.py")
    script.write_text(script.read_text().replace("for step in (1, 2)", "for step in ()"))
    run_sweep("keep_weights=best", "seeds=[0]", "--variant", "a")
    assert weights_in(Path("runs/mine-a-seed0")) == {"final": "2"}
    assert "no checkpoint was both saved and evaluated, so that final/ is kept" in capsys.readouterr().out


def test_a_run_that_ended_before_it_was_collected_is_collected_and_not_run_again(workplace, capsys):
    run_sweep("keep_weights=all", "seeds=[0]")
    shutil.rmtree("results")
    run_sweep("seeds=[0]")  # the script would fail: there is a final/
    assert len(read_table(Path("results/mine/runs.csv"))) == 2


def test_changed_settings_are_not_taken_for_the_same(workplace):
    run_sweep("seeds=[0]", "keep_weights=all")
    write_sweep(VARIANTS | {"b": {"epochs_per_rollout_batch": 4}})
    with pytest.raises(
        UserError, match=r"results/mine/runs.csv: b, seed 0 was run with other settings .* --rerun b runs"
    ):
        run_sweep()
    shutil.rmtree("results")
    with pytest.raises(UserError, match="mine-b-seed0 was run with other settings: epochs_per_rollout_batch 2 -> 4"):
        run_sweep()


def test_a_fingerprint_follows_from_what_is_computed_alone(workplace):
    def fingerprint(*overrides):
        return sweep_plan.plan(Path("mine.yaml"), ["preset=laptop", *overrides])[1][0].fingerprint

    same = fingerprint("learning_rate=1e-5", "wandb_mode=offline", "max_rollout_seconds=7200")
    assert same == fingerprint("learning_rate=0.00001", "runs_dir=elsewhere") != fingerprint("learning_rate=2e-5")


def test_a_changed_preset_is_found_but_a_row_of_before_presets_were_counted_is_taken(workplace):
    run_sweep("seeds=[0]", "keep_weights=all")
    table = Path("results/mine/runs.csv")
    old = re.sub("(,[0-9a-f]{12})-[0-9a-f]{12},", r"\1,", table.read_text())
    presets = Path("grpo_train.yaml").read_text()
    Path("grpo_train.yaml").write_text(presets.replace("n_grpo_steps: 24", "n_grpo_steps: 25"))
    assert Path("grpo_train.yaml").read_text() != presets
    with pytest.raises(UserError, match="b, seed 0 was run with other values of its preset, or of a default"):
        run_sweep("seeds=[0]")
    table.unlink()  # the run's folder alone tells: neither collected nor resumed as if it had today's preset
    for _ in ("to collect", "interrupted"):
        with pytest.raises(UserError, match="mine-b-seed0 was run with other settings: n_grpo_steps 24 -> 25; --rerun"):
            run_sweep("seeds=[0]")
        shutil.rmtree("runs/mine-b-seed0/final", ignore_errors=True)
    table.write_text(old)
    run_sweep("seeds=[0]")  # nothing is left to do


def test_no_sweep_mixes_the_dtypes_of_two_processors(workplace, monkeypatch):
    def fingerprint(dtype, *overrides):
        monkeypatch.setattr("plainrl.shared_config.fast_dtype", lambda device: dtype)
        return sweep_plan.plan(Path("mine.yaml"), ["preset=laptop", *overrides])[1][0].fingerprint

    write_sweep({"a": {}})
    fast, slow = fingerprint("bfloat16"), fingerprint("float32")
    assert fast.partition("-")[0] == slow.partition("-")[0] and fast != slow
    as_fast = fingerprint("float32", "compute_dtype=bfloat16", "engine_dtype=bfloat16")
    assert as_fast.partition("-")[2] == fast.partition("-")[2]  # they compute the same


def test_the_values_of_a_warm_start_are_in_the_fingerprint(workplace, monkeypatch):
    (run, *_) = plan(Path("mine.yaml"), ["preset=laptop"])[1]
    assert run.values["warm_start"]["preset"] == "warm-start" and "seed" not in run.values
    text = sweep_plan.WARM_START_YAML.read_text()
    other = workplace / "other.yaml"
    other.write_text(text.replace("    num_sft_examples: 256\n", "    num_sft_examples: 255\n", 1))
    monkeypatch.setattr(sweep_plan, "WARM_START_YAML", other)
    (changed, *_) = plan(Path("mine.yaml"), ["preset=laptop"])[1]
    assert (run.values["warm_start"]["num_sft_examples"], changed.values["warm_start"]["num_sft_examples"]) == (
        256,
        255,
    )
    assert changed.fingerprint != run.fingerprint


def test_a_variant_is_run_again(workplace, capsys):
    """Its rows and folders go, those of the others stay; with another setting, too."""
    run_sweep("seeds=[0]", "keep_weights=all")
    other = Path("runs/mine-a-seed0/config.yaml").stat().st_mtime_ns
    write_sweep(VARIANTS | {"b": {"epochs_per_rollout_batch": 4}})
    before = read_table(Path("results/mine/runs.csv"))
    capsys.readouterr()
    run_sweep("seeds=[0]", "--rerun", "b", "--dry-run")
    assert "1 of 1 runs to go" in capsys.readouterr().out
    assert read_table(Path("results/mine/runs.csv")) == before
    run_sweep("seeds=[0]", "--rerun", "b", "keep_weights=all")
    after = read_table(Path("results/mine/runs.csv"))
    assert [row["variant"] for row in after] == ["b", "a"] and after[1] == before[1]
    assert after[0]["fingerprint"] != before[0]["fingerprint"]
    assert yaml.safe_load(Path("runs/mine-b-seed0/config.yaml").read_text())["epochs_per_rollout_batch"] == 4
    assert Path("runs/mine-a-seed0/config.yaml").stat().st_mtime_ns == other
    with pytest.raises(UserError, match="--rerun c: mine.yaml has b a"):
        run_sweep("--rerun", "c")
    with lock_folder(Path("runs/mine-b-seed0")), pytest.raises(UserError, match="is being written by process"):
        run_sweep("seeds=[0]", "--rerun", "b")


def test_the_same_error_twice_in_a_row_stops_the_sweep(workplace, capsys):
    script = Path("GRPO_train.py")
    failing = 'print(f"error: {folder.name} at {time.time()} has no data")\nsys.exit(2)\n'
    script.write_text(script.read_text().replace('print("a line of output")\n', failing))
    with pytest.raises(SystemExit):
        run_sweep()
    error = capsys.readouterr().err
    assert error.startswith("the same error twice in a row: 2 runs are not started\nfailed:\n")
    assert error.count("has no data") == 2 and not Path("runs/mine-b-seed1").exists()


def test_two_different_errors_do_not_stop_a_sweep(workplace, capsys):
    script = Path("GRPO_train.py")
    failing = 'sys.exit(f"error: {(folder.name, len(folder.name) * chr(120))[seed]}")\n'.replace(
        "[seed]", "[int(values['seed']) % 2]"
    )
    script.write_text(script.read_text().replace('print("a line of output")\n', failing))
    write_sweep({"b": {"epochs_per_rollout_batch": 2}}, seeds=[0, 1, 2])
    with pytest.raises(SystemExit):
        run_sweep()
    assert "twice in a row" not in capsys.readouterr().err and Path("runs/mine-b-seed2.log").exists()


def test_any_sweep_gets_its_figure_and_its_table(workplace, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "write_figures_and_table", write_figures_and_table)
    run_sweep()
    readme = Path("results/mine/README.md").read_text()
    assert readme.startswith("# mine\n\n<!-- table -->\n| variant | last |") and "![curves](mine.png)" in readme
    rows = [line.split(" | ") for line in readme.splitlines() if line.startswith(("| b", "| a"))]
    assert [row[1] for row in rows] == ["0.250 +- 0.000"] * 2
    assert Path("results/mine/mine.png").read_bytes().startswith(b"\x89PNG")
    Path("results/mine/README.md").write_text(readme.replace("# mine", "# What I found"))
    run_sweep("--rerun", "a")
    assert Path("results/mine/README.md").read_text() == readme.replace("# mine", "# What I found")
    assert "drawn: results/mine/mine.png" in capsys.readouterr().out


def test_the_sweep_of_how_to_is_valid_and_gets_its_figure(workplace, monkeypatch):
    page = (REPOSITORY / "docs/how_to.md").read_text()
    Path("my_sweep.yaml").write_text(re.search(r"^```yaml\n(# my_sweep.yaml\n.*?)^```$", page, re.S | re.M)[1])
    for name in ("SFT_train.py", "GRPO_train.py"):
        (workplace / name).write_text(FAKE_SCRIPT)
    shutil.copy(REPOSITORY / "config.yaml", workplace)
    monkeypatch.setattr(sweep, "write_figures_and_table", write_figures_and_table)
    sweep.main(["my_sweep.yaml", "preset=laptop"])
    planned = plan(Path("my_sweep.yaml"), ["preset=laptop"])[1]
    rows = read_table(Path("results/my_sweep/runs.csv"))
    assert {(row["variant"], row["seed"]) for row in rows} == {(run.variant, str(run.seed)) for run in planned}
    assert Path("results/my_sweep/my_sweep.png").exists() and Path("results/my_sweep/README.md").exists()


def test_the_rewards_of_further_validation_sets_are_kept(tmp_path):
    """Also where another run of the sweep has none, or others."""
    for seed, name in enumerate(("four", "", "six")):
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        (folder / "config.yaml").write_text("seed: 0\n")
        row = {"eval_step": 1, "eval/answer_reward": 0.5} | ({f"eval/{name}/answer_reward": seed / 8} if name else {})
        (folder / "metrics.jsonl").write_text(json.dumps(row | {"eval/six/format_reward": 1.0}) + "\n")
        collect_run(folder, tmp_path / "results", {"variant": "a", "seed": seed, "fingerprint": ""}, 1.0, ["a"])
    header, *lines = (tmp_path / "results/metrics.csv").read_text().splitlines()
    assert header.split(",")[len(METRIC_COLUMNS) :] == ["eval/four/answer_reward", "eval/six/answer_reward"]
    assert [line.split(",")[len(METRIC_COLUMNS) :] for line in lines] == [["0", ""], ["", ""], ["", "0.25"]]
    forget_run(tmp_path / "results", "a", 2)
    assert (tmp_path / "results/metrics.csv").read_text().splitlines()[0].endswith("eval/four/answer_reward")


def test_a_setting_may_be_a_mapping(workplace):
    sets = {"four": "arithmetic:4", "six": "arithmetic:6"}
    write_sweep(settings={"extra_validation_data": sets})
    _, runs = plan(Path("mine.yaml"), ["preset=laptop"])
    assert all(run.settings["extra_validation_data"] == sets for run in runs)


def test_the_panels_of_a_figure_follow_from_what_was_logged(workplace, monkeypatch):
    run_sweep("seeds=[0]")
    curves = [Curve("mine", variant, variant) for variant in VARIANTS]
    (groups,) = own_figure("mine", curves, Path("results"), "").values()
    assert [panel.metric for panel in groups[0].panels] == ["eval/answer_reward"]  # over optimizer steps
    metrics = Path("results/mine/metrics.csv")
    rows = [row | {"rollout/reward": "0.5"} if row["train_step"] else row for row in read_table(metrics)]
    monkeypatch.setattr("experiments.sweep_figures.rows_of", lambda *_: rows)
    (groups,) = own_figure("mine", curves, Path("results"), "").values()
    assert [panel.axis for panel in groups[0].panels] == ["rollout_batches", "minutes"]
    assert own_figure("mine", [Curve("mine", "gone", "gone")], Path("results"), "") == {}


def test_a_sweep_without_questions_shows_loss_and_accuracy_on_pairs(tmp_path):
    """DPO on a GPU has held-out pairs alone."""
    folder, results = tmp_path / "run", tmp_path / "results/mine"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    rows = [{"eval_step": step, "eval/accuracy": 0.5 + step / 8} for step in (0, 2)]
    rows[1:1] = [{"train_step": step, "train/loss": 0.6, "train/loss_per_pair": 0.6 / step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    collect_run(folder, results, {"variant": "a", "seed": 0, "fingerprint": ""}, 1.0, ["a"])
    assert [row["eval/accuracy"] for row in read_table(results / "metrics.csv")] == ["0.5", "", "", "0.75"]
    (groups,) = own_figure("mine", [Curve("mine", "a", "a")], tmp_path / "results", "").values()
    assert [panel.metric for panel in groups[0].panels] == ["train/loss_per_pair", "eval/accuracy"]
    write_figures_and_table(results, "mine")
    assert (results / "mine.png").exists()


def test_what_tells_the_variants_apart_is_not_overridden_for_all_of_them(workplace):
    with pytest.raises(UserError, match=r"epochs_per_rollout_batch on the command line: mine.yaml .* variants \(b\)"):
        run_sweep("epochs_per_rollout_batch=3", "--dry-run")


def test_failures_are_listed_with_their_last_line_and_the_others_run(workplace, capsys):
    write_sweep({"bad": {"length_normalization": "token_mean"}} | VARIANTS)
    with pytest.raises(SystemExit) as caught:
        run_sweep("seeds=[0]")
    assert caught.value.code == 1
    assert capsys.readouterr().err == "failed:\n  runs/mine-bad-seed0.log: error: it failed\n"
    assert [row["variant"] for row in read_table(Path("results/mine/runs.csv"))] == ["b", "a"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_run_once_and_the_sweep_can_go_on(workplace, number, status):
    write_sweep({"slow": {"length_normalization": "masked_normalize"}, **VARIANTS})
    code = (
        "from pathlib import Path\nfrom experiments import sweep, sweep_plan\nfrom plainrl.cli import run_main\n"
        "sweep_plan.REPOSITORY = Path.cwd()\nrun_main(sweep.main)\n"
    )
    command = [sys.executable, "-c", code, "mine.yaml", "preset=laptop", "seeds=[0]"]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    folder = Path("runs/mine-slow-seed0")
    deadline = time.monotonic() + 600
    while not (folder / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (folder / "ready").exists()
    os.killpg(process.pid, number)  # as the terminal does
    _, output = process.communicate(timeout=300)
    assert process.returncode == status
    assert (folder / "saved").read_text() == "once"
    command = run_command("python -m experiments.sweep mine.yaml preset=laptop seeds=[0]")
    assert f"to continue: {command}" in output.replace("'", "")
    assert not Path("runs/mine-b-seed0").exists() and not Path("results").exists()

    run_sweep("seeds=[0]")
    slow = read_table(Path("results/mine/runs.csv"))[0]
    ends = re.findall(r"status (-?\d+) after ([\d.]+) minutes", Path("runs/mine-slow-seed0.log").read_text())
    assert [end[0] for end in ends] == ["143", "0"]
    assert float(slow["wall_minutes"]) == pytest.approx(sum(float(end[1]) for end in ends), rel=1e-3)


def test_an_output_that_nobody_reads_stops_the_runs_in_progress(workplace, monkeypatch):
    """`... | head -1`: the sweep ends at the first line that nobody reads, and no run of it goes on alone."""
    write_sweep({"slow": {"length_normalization": "masked_normalize"}, **VARIANTS})
    started = []

    def start(*arguments, **options):
        started.append(Popen(*arguments, **options))
        return started[-1]

    def broken(*texts, **options):
        if str(texts[0]).startswith("1 of"):
            raise BrokenPipeError

    Popen = subprocess.Popen  # noqa: N806
    monkeypatch.setattr("subprocess.Popen", start)
    monkeypatch.setattr("builtins.print", broken)
    with pytest.raises(BrokenPipeError):
        run_sweep("seeds=[0]")
    assert len(started) == 1 and started[0].returncode is not None


def test_a_run_of_before_a_key_was_there_has_its_default(workplace):
    """A sweep that sets the key to its default takes the run for its own; another value is another setting."""
    folder = Path("runs/mine-a-seed0")
    folder.mkdir(parents=True)
    write_sweep({"a": {"drop_long_examples": False}})
    (run,) = plan(Path("mine.yaml"), ["seeds=[0]", "preset=laptop"])[1]
    values = json.loads(Path("preset.json").read_text()) | run.settings
    old = {key: value for key, value in values.items() if key != "drop_long_examples"}
    (folder / "config.yaml").write_text(yaml.safe_dump(old))
    assert sweep.state_of(run, Path("results/mine")) == "interrupted"
    write_sweep({"a": {"drop_long_examples": True}})
    (run,) = plan(Path("mine.yaml"), ["seeds=[0]", "preset=laptop"])[1]
    with pytest.raises(UserError, match="was run with other settings: drop_long_examples False -> True"):
        sweep.state_of(run, Path("results/mine"))


def test_one_run_at_a_time_on_each_gpu(workplace, monkeypatch):
    seen = Path("seen.txt").resolve()
    script = Path("GRPO_train.py")
    prelude = (  # a GPU that is ahead waits for the other one
        "import os, time\nfrom pathlib import Path\n"
        f"gpu, seen = os.environ['CUDA_VISIBLE_DEVICES'], Path({str(seen)!r})\n"
        "with seen.open('a') as file: file.write(gpu + '\\n')\n"
        "for _ in range(3000):\n"
        "    lines = seen.read_text().split()\n"
        "    if 2 * lines.count(gpu) <= len(lines): break\n"
        "    time.sleep(0.02)\n"
    )
    script.write_text(prelude + script.read_text())
    run_sweep("--gpus", "0,3", "n_grpo_steps=2")
    assert sorted(seen.read_text().split()) == ["0", "0", "3", "3"]
    assert len(read_table(Path("results/mine/runs.csv"))) == 4


def test_on_gpus_the_preset_is_that_of_one_of_them(workplace, monkeypatch):
    for found, taken in (("two-gpu", "one-gpu"), ("small-gpu", "small-gpu"), ("laptop", "one-gpu")):
        monkeypatch.setattr("experiments.sweep_plan.choose_preset", lambda found=found: (found, "as if"))
        assert plan_sweep(["mine.yaml", "--gpus", "0,1"])[1] == Path(f"results/mine-{taken}")
    monkeypatch.setattr("experiments.sweep_plan.choose_preset", lambda: pytest.fail("asked"))
    assert plan_sweep(["mine.yaml", "--gpus", "0,1", "preset=two-gpu"])[1] == Path("results/mine-two-gpu")


def test_a_value_may_be_null(workplace):
    """So that a variant can take a recipe's setting back."""
    write_sweep({}, grid={"cliprange_high": [None, 0.28]}, settings={"recipe": "dapo"})
    runs = plan(Path("mine.yaml"), ["seeds=[0]", "preset=laptop"])[1]
    assert [run.variant for run in runs] == ["cliprange_high=null", "cliprange_high=0.28"]
    assert [run.settings["cliprange_high"] for run in runs] == [None, 0.28]


def test_sessions_that_end_runs_at_the_same_time_lose_no_row(tmp_path):
    def collect(seed):
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        (folder / "config.yaml").write_text("seed: 0\n")
        (folder / "metrics.jsonl").write_text('{"train_step": 1, "train/loss": 0.5}\n')
        collect_run(folder, tmp_path / "results", {"variant": "a", "seed": seed, "fingerprint": ""}, 1.0, ["a"])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(collect, range(16)))
    for name in ("runs.csv", "metrics.csv"):
        assert [row["seed"] for row in read_table(tmp_path / "results" / name)] == [str(seed) for seed in range(16)]


def test_another_preset_has_results_of_its_own_and_no_laptop_settings(workplace):
    write_sweep(laptop={"group_size": 4})
    results, runs = sweep_plan.plan(Path("mine.yaml"), ["preset=laptop"])
    assert (str(results), runs[0].folder.name, runs[0].settings["group_size"]) == ("results/mine", "mine-b-seed0", 4)
    results, runs = sweep_plan.plan(Path("mine.yaml"), [], preset="one-gpu")
    assert (str(results), runs[0].folder.name) == ("results/mine-one-gpu", "mine-one-gpu-b-seed0")
    assert "group_size" not in runs[0].settings and runs[0].settings["preset"] == "one-gpu"


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"gird": {}}, [], "mine.yaml: gird: Extra inputs are not permitted"),
        ({"script": "train.py"}, [], "mine.yaml: script: Input should be 'SFT_train.py'"),
        ({"seeds": []}, [], "mine.yaml: seeds: "),
        ({"minutes": {"b": 1}}, [], "mine.yaml: minutes: give one number, or one for each of b, a"),
        ({"variants": {"x/y": {}}}, [], "mine.yaml: variants: 'x/y' must name a folder"),
        ({"grid": {"model": ["Q/x"]}}, [], "mine.yaml: grid: 'model=Q/x' must name a folder: write it under variants"),
        ({"variants": {"x": {"lr": 1}}}, [], "mine.yaml, x: unknown key lr"),
        ({"settings": {"seed": 1}}, [], "mine.yaml: seed must not be a setting of a sweep"),
        ({}, ["seeds=0"], "seeds = 0: write a list"),
        ({}, ["seeds=[0"], "seeds = [0: write a list"),
        ({}, ["seeds=[true]"], "seeds = [true]: write a list"),
        ({}, ["seeds=2001-99-99"], "seeds = 2001-99-99: write a list"),
        ({}, ["seeds=[0,0]"], "seeds = [0,0]: write a list of different"),
        ({"seeds": [1, 1]}, [], "mine.yaml: seeds: Value error, a seed stands there twice"),
        ({"grid": {"seed": []}}, [], "mine.yaml: grid.seed: "),
        ({"variants": {"x": {"preset": "laptop"}}}, [], "mine.yaml: all variants share one preset"),
        ({}, ["learning_rate"], "argument 'learning_rate': write key=value"),
        ({}, ["learning_rate=fast"], "mine.yaml, b: learning_rate = 'fast'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(workplace, values, overrides, message):
    write_sweep(**values)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        run_sweep(*overrides)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()


def test_every_committed_sweep_counts_as_finished(monkeypatch, capsys):
    """The fingerprints in results/*/runs.csv hold wherever a script has moved to. All were computed in bfloat16."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("plainrl.shared_config.fast_dtype", lambda device: "bfloat16")
    sweeps = tracked_files("experiments/sweeps/*.yaml")
    assert len(sweeps) >= 17
    for path in sweeps:
        sweep.main([str(path.relative_to(REPOSITORY)), "--dry-run", "preset=laptop"])
        *lines, summary = capsys.readouterr().out.splitlines()
        assert lines and {line.split()[0] for line in lines} == {"finished"}, path
        assert summary.startswith(f"0 of {len(lines)} runs to go, "), path


def test_a_run_is_started_from_any_folder(tmp_path):
    def command(name):
        path = REPOSITORY / f"experiments/sweeps/{name}.yaml"
        return sweep_plan.plan(path, ["preset=laptop"])[1][0].command

    own = tmp_path / "dpo.yaml"
    own.write_text("script: DPO_train.py\nseeds: [0]\nminutes: 1\ngrid: {beta: [0.1, 0.3]}\n")
    runs = sweep_plan.plan(own, ["preset=laptop"])[1]
    assert [run.folder.name for run in runs] == ["dpo-beta=0.1-seed0", "dpo-beta=0.3-seed0"]
    assert runs[1].command[1:4] == ["-m", "supplement.DPO_train", "beta=0.3"]

    assert command("expert_iteration")[:3] == [sys.executable, "-m", "experiments.expert_iteration"]
    assert command("zero_shot")[:2] == [sys.executable, str(REPOSITORY / "policy_evaluation.py")]


def test_the_arguments_of_a_sweep_are_those_of_its_script():
    """An evaluation cannot be resumed, and refuses to be. All else goes on where it was stopped."""
    for run in [run for path in tracked_files("experiments/sweeps/*.yaml") for run in plan(path, ["preset=laptop"])[1]]:
        assert ("resume=auto" in run.arguments) == (run.script != "policy_evaluation.py")


def test_the_folder_of_an_evaluation_that_still_runs_stays(workplace):
    """A sweep that is killed leaves its runs alone, because each has a session of its own."""
    (workplace / "policy_evaluation.py").write_text("raise AssertionError('must not start')")
    shutil.copy(REPOSITORY / "config.yaml", workplace)
    write_sweep({"a": {}}, script="policy_evaluation.py", seeds=[0])
    folder = Path("runs/mine-a-seed0")
    folder.mkdir(parents=True)
    with lock_folder(folder), pytest.raises(UserError, match="is being written by process"):
        run_sweep()
    assert (folder / "lock").exists()


def test_a_run_that_outlives_its_sweep_is_not_started_again_and_its_time_is_not_known(workplace):
    """No second process is started beside it, whose end would be taken for the run's."""
    write_sweep({"a": {}}, seeds=[0])
    run_sweep()
    (row,) = read_table(Path("results/mine/runs.csv"))
    folder, log = Path("runs/mine-a-seed0"), Path("runs/mine-a-seed0.log")
    shutil.rmtree("results")
    shutil.rmtree(folder / "final")
    with lock_folder(folder), pytest.raises(UserError, match="is being written by process"):
        run_sweep()
    started, ended = "\nsweep: started\n", "\nsweep: ended with status {} after {} minutes\n"
    logs = {
        started + ended.format(2, 0.1) + "the run itself went on": "",
        started + "both were killed" + started + ended.format(0, 9): "",
        started + ended.format(143, 0.5) + started + ended.format(0, 9): "9.5",
    }
    for text, minutes in logs.items():
        (folder / "final").mkdir(exist_ok=True)
        shutil.rmtree("results", ignore_errors=True)
        log.write_text(text)
        run_sweep()
        assert read_table(Path("results/mine/runs.csv")) == [row | {"wall_minutes": minutes}]


@pytest.mark.parametrize("preset", ["laptop", "one-gpu"])
def test_every_sweep_file_is_valid_for_its_script(preset):
    for path in tracked_files("experiments/sweeps/*.yaml"):
        if preset not in (sweep_plan.read_sweep(path).presets or [preset]):
            with pytest.raises(UserError, match="its settings are for preset=laptop, not for preset=one-gpu"):
                plan(path, [f"preset={preset}"])
            continue
        _, runs = plan(path, [f"preset={preset}"])
        assert len({run.folder for run in runs}) == len(runs)
        trained = [run for run in runs if run.script != "policy_evaluation.py"]
        assert len({run.seed for run in trained}) in (0, 3)
        fingerprints = {run.fingerprint for run in runs}
        assert len(fingerprints) == len({run.variant for run in runs}), f"{path}: two variants have the same settings"
