"""A run's folder holds what was run and what came of it; wandb gets the same, offline, with its axes."""

import json
import math
import struct

import pytest
import yaml

import run_directory
from run_config import SFTConfig, UserError
from run_directory import Line, RunDirectory, plot_metrics


def config_in(folder, **values):
    return SFTConfig(runs_dir=str(folder), wandb_mode="disabled").model_copy(update=values)


def test_folder_records_configuration_and_environment(tmp_path):
    with RunDirectory.create(config_in(tmp_path, run_name="mine", learning_rate=3e-5), "sft") as run:
        assert run.path == tmp_path / "mine"
    saved = yaml.safe_load((run.path / "config.yaml").read_text())
    assert SFTConfig.model_validate(saved) == run.config
    assert saved["learning_rate"] == 3e-5
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["command"]
    assert {"git_commit", "git_diff", "cpu_count", "platform"} <= set(environment)


def test_an_existing_run_is_never_overwritten(tmp_path):
    config = config_in(tmp_path, run_name="mine")
    RunDirectory.create(config, "sft")
    with pytest.raises(UserError, match="run_name = mine: .* exists already"):
        RunDirectory.create(config, "sft")
    (tmp_path / "other").mkdir()
    for name in ("other", "."):
        with pytest.raises(UserError, match="exists already"):
            RunDirectory.create(config_in(tmp_path, run_name=name), "sft")


def test_an_unnamed_run_is_named_by_script_and_time_in_its_own_record(tmp_path):
    run = RunDirectory.create(config_in(tmp_path), "sft")
    assert run.path.name.startswith("sft-20")
    assert yaml.safe_load((run.path / "config.yaml").read_text())["run_name"] == run.path.name


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make"):
        RunDirectory.create(config_in(tmp_path / "file"), "sft")


def test_metrics_are_on_disk_at_once_and_valid_json(tmp_path):
    run = RunDirectory.create(config_in(tmp_path), "sft")
    run.log({"train_step": 1, "train/loss": 0.5, "x": None, "y": math.nan, "z": math.inf})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0], parse_constant=pytest.fail) == {
        "train_step": 1,
        "train/loss": 0.5,
        "x": None,
        "y": None,
        "z": None,
    }
    assert run.read_metrics() == [json.loads(lines[0])]


def test_figures_are_drawn_from_the_rows_that_have_the_metric(tmp_path):
    rows = [
        {"train_step": 1, "train/loss": 1.0},
        {"eval_step": 0, "eval/reward": None},
        {"train_step": 2, "train/loss": 0.5},
    ]
    path = tmp_path / "figure.png"
    panels = {
        "loss": [Line(rows, "train_step", "train/loss", "loss")],
        "none": [Line(rows, "eval_step", "eval/reward", "reward")],
    }
    plot_metrics(panels, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_wandb_is_off_without_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert run_directory.start_wandb(config_in(tmp_path, wandb_mode="auto"), tmp_path) is None


def test_wandb_offline_receives_the_metrics_with_their_axes(tmp_path):
    config = config_in(tmp_path, wandb_mode="offline", run_name="mine")
    with RunDirectory.create(config, "sft") as run:
        run.start_wandb()
        run.log({"train_step": 1, "train/loss": 0.5})
        run.log({"eval_step": 0, "eval/reward": 0.25, "eval/response_length_correct": None})
    (written,) = run.path.glob("wandb/offline-run-*/*.wandb")
    records = read_wandb(written)
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.history.item
    ]
    assert {"train_step": 1, "train/loss": 0.5}.items() <= history[0].items()
    assert {"eval_step": 0, "eval/reward": 0.25}.items() <= history[1].items()
    assert "eval/response_length_correct" not in history[1]
    metrics = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    globs = {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}
    axes = {metric.glob_name: metric.step_metric_index for metric in metrics if metric.glob_name}
    names = [metric.name for metric in metrics]
    assert {"train_step", "eval_step"} <= set(names)
    assert {"train/*", "eval/*"} <= set(globs)
    for glob, axis in (("train/*", "train_step"), ("eval/*", "eval_step")):
        assert globs[glob] == axis or names[axes[glob] - 1] == axis


def read_wandb(path):
    """The records of a .wandb file: 7 bytes, then a LevelDB log (crc, length, type, payload) in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, position, pending, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last piece of one
            records.append(wandb_internal_pb2.Record.FromString(pending))
            pending = b""
    return records
