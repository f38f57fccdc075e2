"""What is written down of a run: figures, and the metrics in wandb, offline, with their axes; wandb ends no run."""

import json
import struct
import time

import pytest
from test_run_folder import config_in, go_on, resumed
from tiny import new_state

from plainrl import run_records
from plainrl.records import UserError
from plainrl.run_folder import RunFolder
from plainrl.run_records import Line, plot_metrics, read_metrics, set_damaged_lines_aside, start_wandb


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


def test_a_panel_says_which_of_its_lines_are_smoothed(tmp_path, monkeypatch):
    """All: on the axis. Some: in the legend, also where the first one is not."""
    labels, axes = [], []
    draw, describe = run_records.draw_series, run_records.describe_axis
    monkeypatch.setattr(
        run_records, "draw_series", lambda a, n, label, *r, **k: labels.append(label) or draw(a, n, label, *r, **k)
    )
    monkeypatch.setattr(run_records, "describe_axis", lambda *of: axes.append(describe(*of)) or axes[-1])
    rows = [{"step": step, "a": 1.0, "b": 2.0} for step in range(1, 101)]
    few, many = Line(rows[::20], "step", "a", "few"), Line(rows, "step", "b", "many", window=5)
    plot_metrics({"mixed": [few, many], "all": [many, many], "none": [few]}, tmp_path / "figure.png")
    assert labels == ["few", "many (mean of 5)", "many", "many", "few"]
    assert axes == ["mixed", "all\nmean of the last 5 steps", "none"]


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"b"\r: 2 garbage',  # a carriage return ends no line: the rows behind it stay where they are
        b'{"train_step": 1' + b"0" * 319 + b"}",  # an integer of 320 digits, too large for a float
    ],
    ids=["carriage return", "320 digits"],
)
def test_a_damaged_line_moves_no_other_row(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n' + damaged + b'\n{"c": 3}\n')
    with pytest.raises(UserError, match="line 2 is damaged: "):
        read_metrics(tmp_path)
    set_damaged_lines_aside(tmp_path)
    assert path.read_bytes() == b'{"a": 1}\n{}' + b" " * (len(damaged) - 2) + b'\n{"c": 3}\n'
    assert read_metrics(tmp_path) == [{"a": 1}, {}, {"c": 3}]


class BrokenWandb:
    """A wandb run of which one method fails."""

    id = "abc"

    def __init__(self, method):
        self.method = method

    def __getattr__(self, name):
        def call(*_, **__):
            if name == self.method:
                raise ConnectionError(f"{name} failed\nmore")

        return call


@pytest.mark.parametrize("method", ["define_metric", "log", "finish"])
def test_a_crash_in_wandb_never_stops_training(tmp_path, capsys, monkeypatch, method):
    monkeypatch.setattr("wandb.init", lambda **_: BrokenWandb(method))
    with RunFolder.create(config_in(tmp_path, wandb_mode="offline"), "sft") as run:
        run.start_wandb()
        for step in (1, 2):
            run.log({"train_step": step})
    assert [row["train_step"] for row in run.read_metrics()] == [1, 2]
    assert capsys.readouterr().out.count(f"({method} failed) and is off") == 1


def test_wandb_that_does_not_start_never_stops_training(tmp_path, capsys, monkeypatch):
    import wandb

    def broken(**_):
        raise RuntimeError("no room")

    monkeypatch.setattr(wandb, "init", broken)
    with RunFolder.create(config_in(tmp_path, wandb_mode="offline"), "sft") as run:
        run.start_wandb()
        run.log({"train_step": 1})
    assert "wandb did not start (no room) and is off" in capsys.readouterr().out


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, tiny_model, tokenizer):
    config = config_in(tmp_path, wandb_mode="offline", run_name="mine")
    with RunFolder.create(config, "sft") as run:
        run.start_wandb()
        run.log({"train_step": 1})
        state = new_state(tiny_model, tokenizer)
        run.complete_step(state, 1)
        run.save_checkpoint(state)
    with resumed(run) as run:
        run.start_wandb()
        go_on(run, tiny_model, tokenizer)
        run.log({"train_step": 2})
    ids = {path.stem.removeprefix("run-") for path in run.path.glob("wandb/offline-run-*/*.wandb")}
    assert len(ids) == 1
    history = [record for path in run.path.glob("wandb/offline-run-*/*.wandb") for record in read_wandb(path)]
    steps = [
        json.loads(i.value_json) for r in history for i in r.history.item if "train_step" in (i.key, *i.nested_key)
    ]
    assert sorted(steps) == [1, 2]


def test_wandb_is_off_without_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert start_wandb(config_in(tmp_path, wandb_mode="auto"), tmp_path) is None


def test_wandb_offline_receives_the_metrics_with_their_axes(tmp_path):
    config = config_in(tmp_path, wandb_mode="offline", run_name="mine")
    with RunFolder.create(config, "sft") as run:
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
    """The records of a .wandb file, once its last one is there: wandb's own process writes it a little later."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        records = parse_wandb(path)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.05)
    raise TimeoutError("wandb has not written its last record")


def parse_wandb(path):
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
