"""A run's folder holds what was run and what came of it; wandb gets the same, offline, with its axes."""

import errno
import json
import math
import os
import struct
import subprocess
import sys
import time

import pytest
import torch
import yaml
from test_run_checkpoint import new_state, take_step
from tiny import REPOSITORY

import run_directory
from run_config import GRPOConfig, SFTConfig, UserError, load_config
from run_directory import Line, RunDirectory, compare_runs, list_runs, plot_metrics


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
    (tmp_path / "other/notes.txt").touch()
    for name in ("other", "."):
        with pytest.raises(UserError, match="exists already"):
            RunDirectory.create(config_in(tmp_path, run_name=name), "sft")
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_folder_whose_process_was_killed_before_it_was_a_run_is_taken_over(tmp_path):
    config = config_in(tmp_path, run_name="mine")
    with RunDirectory.create(config, "sft") as run:
        (run.path / "config.yaml").rename(run.path / ".config.yaml.unfinished")
    with RunDirectory.create(config, "sft") as run:
        assert sorted(file.name for file in run.path.iterdir()) == [
            "config.yaml",
            "environment.json",
            "lock",
            "samples",
        ]


def test_an_unnamed_run_is_named_by_script_and_time_in_its_own_record(tmp_path):
    run = RunDirectory.create(config_in(tmp_path), "sft")
    assert run.path.name.startswith("sft-20")
    assert yaml.safe_load((run.path / "config.yaml").read_text())["run_name"] == run.path.name


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make"):
        RunDirectory.create(config_in(tmp_path / "file"), "sft")

    def fail(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context, pytest.raises(UserError, match=r"cannot make .*mine \(No space left"):
        context.setattr(run_directory, "write_durably", fail)
        RunDirectory.create(config_in(tmp_path, run_name="mine"), "sft")
    RunDirectory.create(config_in(tmp_path, run_name="mine"), "sft")  # the name is free


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


HOLD = """
import sys
from pathlib import Path
from run_directory import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_by_number_and_host_of_the_first(tmp_path):
    with RunDirectory.create(config_in(tmp_path, run_name="mine"), "sft") as run:
        run.log({"train_step": 1})
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.stdout.readline() == "held\n"
    config = config_in(tmp_path, run_name="mine", resume=str(run.path))
    with pytest.raises(UserError, match=rf"is being written by process {process.pid} on {os.uname().nodename}; wait"):
        RunDirectory.open(config, "sft")
    assert "running" in list_runs(tmp_path)
    process.kill()  # a lock does not outlive its process
    process.wait()
    RunDirectory.open(config, "sft")


@pytest.fixture
def stopped_run(tmp_path, tiny_model, tokenizer):
    """A run that was killed in step 4, after checkpoints of steps 1 to 3; step 2 scored best."""
    with RunDirectory.create(config_in(tmp_path, run_name="mine"), "sft") as run:
        state = new_state(tiny_model, tokenizer)
        for step, score in ((1, 0.2), (2, 0.4), (3, 0.3)):
            take_step(state, step)
            run.log({"train_step": step, "time/step": 1.5})
            run.complete_step(state, step)
            run.save_checkpoint(state)
            run.log({"eval_step": step, "eval/answer_reward": score, "eval/seconds": 10})
        run.log({"train_step": 4, "time/step": 1.5})
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"train_step": 5, "tr')
    return run


def resumed(run, *changes):
    config = load_config(SFTConfig, REPOSITORY / "config.yaml", [f"resume={run.path}", *changes])
    return RunDirectory.open(config, "sft")


def go_on(run, model, tokenizer):
    """Restore a run as the scripts do, when everything is loaded; return the state."""
    state = new_state(model, tokenizer)
    run.restore(state, num_steps=100)
    return state


def test_a_resumed_run_has_no_step_twice(stopped_run, tiny_model, tokenizer, capsys):
    """metrics.jsonl is cut back to where the checkpoint was made, before its evaluation, which is done again."""
    with resumed(stopped_run) as run:
        assert go_on(run, tiny_model, tokenizer).step == 3
        assert run.checkpoint == run.path / "checkpoints/step_000003"
        assert [row.get("train_step") for row in run.read_metrics()] == [1, None, 2, None, 3]
    assert "going on after step 3" in capsys.readouterr().out
    environment = json.loads((run.path / "environment_resumed_000003.json").read_text())
    assert environment["resumed_after_step"] == 3 and environment["changed_settings"] == []


def test_a_resumption_that_fails_before_it_begins_changes_nothing(stopped_run):
    """The model may be gone, or the engine not start: the finished run must still be the finished run."""
    stopped_run.finish()
    names = ("config.yaml", "metrics.jsonl", "final/model.safetensors")
    before = {name: (stopped_run.path / name).read_bytes() for name in names}
    with (
        pytest.raises(UserError, match="no model"),
        resumed(stopped_run, "num_epochs=2", "resume_with_changes=true") as run,
    ):
        run.start_wandb()
        raise UserError("no model")
    assert before == {name: (stopped_run.path / name).read_bytes() for name in names}
    assert not list(stopped_run.path.glob("environment_resumed_*"))


def test_a_run_that_is_beyond_the_steps_asked_for_is_left_as_it_is(stopped_run, tiny_model, tokenizer):
    before = (stopped_run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="the run is at step 3 already, 2 are asked for"), resumed(stopped_run) as run:
        run.restore(new_state(tiny_model, tokenizer), num_steps=2)
    assert (stopped_run.path / "metrics.jsonl").read_bytes() == before


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again_by_itself(stopped_run):
    for path in stopped_run.path.glob("checkpoints/*/optimizer.safetensors"):
        path.unlink()
    before = (stopped_run.path / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match="every checkpoint is damaged .damaged_step_000001, damaged_step_000002, "):
            resumed(stopped_run)
    assert (stopped_run.path / "metrics.jsonl").read_bytes() == before


def test_a_run_of_another_script_is_not_resumed(tmp_path):
    with RunDirectory.create(config_in(tmp_path, run_name="mine"), "evaluation") as run:
        run.log({"eval_step": 0, "eval/answer_reward": 0.5})
    assert list_runs(tmp_path).splitlines()[1].split()[:2] == ["mine", "finished"]
    with pytest.raises(UserError, match="this is a run of another script .evaluation, not sft"):
        resumed(run)


def test_another_configuration_file_is_not_ignored_on_resume(stopped_run):
    with pytest.raises(UserError, match="config = config.yaml: .* goes on with its own config.yaml; leave config out"):
        resumed(stopped_run, "config=config.yaml")
    arguments = ["resume=auto", f"runs_dir={stopped_run.path.parent}", f"config={REPOSITORY / 'config.yaml'}"]
    with pytest.raises(UserError, match="mine goes on with its own config.yaml; leave config out"):
        load_config(SFTConfig, "unused.yaml", arguments)
    assert load_config(SFTConfig, "unused.yaml", [*arguments, "run_name=new"]).run_name == "new"


def test_a_torn_newest_checkpoint_is_reported_and_passed_over(stopped_run, tiny_model, tokenizer, capsys):
    weights = stopped_run.path / "checkpoints/step_000003/optimizer.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with resumed(stopped_run) as run:
        go_on(run, tiny_model, tokenizer)
        assert run.checkpoint == run.path / "checkpoints/step_000002"
        assert [row["train_step"] for row in run.read_metrics() if "train_step" in row] == [1, 2]
    assert "step_000003 is damaged and passed over (optimizer.safetensors is not what" in capsys.readouterr().out


def test_a_run_without_a_whole_checkpoint_starts_again(tmp_path, tiny_model, tokenizer, capsys):
    with RunDirectory.create(config_in(tmp_path, run_name="mine"), "sft") as run:
        run.log({"train_step": 1})
    with pytest.raises(KeyboardInterrupt), resumed(run) as again:
        go_on(again, tiny_model, tokenizer)
        assert again.checkpoint is None and again.read_metrics() == []
        raise KeyboardInterrupt
    assert (run.path / "config.yaml").exists()  # what was resumed is never removed
    assert f"starting {run.path} again" in capsys.readouterr().out


def test_metrics_that_were_lost_are_not_made_up(stopped_run):
    os.truncate(stopped_run.path / "metrics.jsonl", 10)
    with pytest.raises(UserError, match=r"metrics.jsonl has 10 bytes, but \d+ when the checkpoint of step 3"):
        resumed(stopped_run)


def test_changed_settings_are_shown_and_refused_unless_allowed(stopped_run, tiny_model, tokenizer, capsys):
    with pytest.raises(UserError, match=r"settings differ .*: seed 0 -> 3, learning_rate 1e-05 -> 0.5; leave them out"):
        resumed(stopped_run, "learning_rate=0.5", "seed=3")
    with resumed(stopped_run, "learning_rate=0.5", "seed=3", "resume_with_changes=true") as run:
        go_on(run, tiny_model, tokenizer)
        assert run.config.learning_rate == 0.5
    assert "changed: seed 0 -> 3, learning_rate 1e-05 -> 0.5" in capsys.readouterr().out
    environment = json.loads((run.path / "environment_resumed_000003.json").read_text())
    assert environment["changed_settings"] == ["seed 0 -> 3", "learning_rate 1e-05 -> 0.5"]
    with resumed(stopped_run) as run:  # the changes are the run's own from here on
        assert run.config.learning_rate == 0.5
    assert "changed since the checkpoint: seed 0 -> 3, learning_rate 1e-05 -> 0.5" in capsys.readouterr().out


def test_watchdogs_and_log_may_change_with_every_start(stopped_run, capsys):
    with resumed(stopped_run, "max_train_seconds=7200", "wandb_project=other") as run:
        assert (run.config.max_train_seconds, run.config.wandb_project) == (7200, "other")
    assert "changed" not in capsys.readouterr().out


def test_a_finished_run_is_not_resumed_unless_it_is_to_go_on_otherwise(stopped_run, tiny_model, tokenizer):
    final = stopped_run.finish()
    assert (final / "model.safetensors").samefile(stopped_run.path / "checkpoints/step_000003/model/model.safetensors")
    with pytest.raises(UserError, match=r"this run is finished; its policy is in .*final"):
        resumed(stopped_run)
    with resumed(stopped_run, "num_epochs=2", "resume_with_changes=true") as run:
        go_on(run, tiny_model, tokenizer)
        assert not final.exists()


def test_resume_names_a_run(tmp_path):
    with pytest.raises(UserError, match="config.yaml does not exist; name the folder of a run"):
        load_config(SFTConfig, REPOSITORY / "config.yaml", [f"resume={tmp_path / 'none'}"])


def test_auto_takes_the_newest_unfinished_run_of_the_same_kind(stopped_run, capsys):
    runs_dir = stopped_run.path.parent
    for name, kind in (("older", SFTConfig), ("grpo", GRPOConfig), ("done", SFTConfig)):
        config = kind(runs_dir=str(runs_dir), run_name=name, wandb_mode="disabled")
        with RunDirectory.create(config, "x") as run:
            (run.path / "checkpoints").mkdir()
            run.log({"train_step": 1})
    (runs_dir / "done/final").mkdir()
    for age, name in enumerate(("mine", "grpo", "older"), start=1):  # by when they were last taken up
        os.utime(runs_dir / name / "lock", (time.time() - age, time.time() - age))
    arguments = ["resume=auto", f"runs_dir={runs_dir}"]
    assert load_config(SFTConfig, REPOSITORY / "config.yaml", arguments).resume == str(stopped_run.path)
    assert load_config(SFTConfig, REPOSITORY / "config.yaml", [*arguments, "run_name=older"]).run_name == "older"
    assert load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", arguments).run_name == "grpo"
    new = load_config(SFTConfig, REPOSITORY / "config.yaml", [*arguments, "run_name=new"])
    assert (new.run_name, new.resume) == ("new", "")
    assert "there is no unfinished run" in capsys.readouterr().out


def test_the_newest_and_the_best_checkpoints_are_kept(stopped_run):
    def names():
        return sorted(path.name for path in (stopped_run.path / "checkpoints").iterdir())

    stopped_run.prune_checkpoints(keep_last=2, keep_best=True)
    assert names() == ["step_000002", "step_000003"]
    stopped_run.prune_checkpoints(keep_last=1, keep_best=True)
    assert names() == ["step_000002", "step_000003"]
    stopped_run.prune_checkpoints(keep_last=1, keep_best=False)
    assert names() == ["step_000003"]


def test_the_table_of_runs(stopped_run):
    lines = list_runs(stopped_run.path.parent).splitlines()
    assert lines[0].split() == "name state step last reward best reward time".split()
    assert lines[1].split() == "mine stopped, can be resumed 4 0.300 0.400 0:00:36".split()
    with pytest.raises(UserError, match="holds no run"):
        list_runs(stopped_run.path)


def test_the_commands_of_the_table(stopped_run, capsys):
    command = [sys.executable, "run_directory.py", str(stopped_run.path.parent)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout == list_runs(stopped_run.path.parent) + "\n"
    capsys.readouterr()
    run_directory.main(["compare", str(stopped_run.path), str(stopped_run.path)])
    assert capsys.readouterr().out.splitlines()[1] == "no setting differs"
    for arguments, message in (
        (["compare", "a"], "usage: "),
        (["compare", "a", "b"], "a is no run"),
        (["none"], "no run"),
    ):
        with pytest.raises(UserError, match=message):
            run_directory.main(arguments)


def test_two_runs_compared(stopped_run, tmp_path):
    other = RunDirectory.create(config_in(tmp_path, run_name="other", learning_rate=0.5), "sft")
    other.log({"eval_step": 0, "eval/answer_reward": 0.25})
    lines = compare_runs(stopped_run.path, other.path).splitlines()
    assert lines[:2] == ["mine -> other", "learning_rate 1e-05 -> 0.5"]
    assert (tmp_path / "compare_mine_other.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("CUDA Error: out of memory. Tried to allocate 2.00 GiB."),  # as vLLM's sleep mode says it
    ],
)
def test_out_of_memory_on_a_gpu_names_the_three_settings(tmp_path, error):
    with pytest.raises(UserError) as caught, RunDirectory.create(config_in(tmp_path), "sft") as run:
        run.log({"train_step": 1})
        raise error
    message = str(caught.value)
    for setting in ("microbatch_tokens", "gradient_checkpointing=true", "gpu_memory_utilization"):
        assert setting in message
    assert "Tried to allocate 2.00 GiB" in message


def test_a_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(UserError, match=r"the disk of .* is full .*resume="),
        RunDirectory.create(config_in(tmp_path), "sft") as run,
    ):
        run.log({"train_step": 1})
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_signal_before_the_first_metrics_keeps_a_state_that_was_saved(tmp_path, tiny_model, tokenizer):
    with pytest.raises(KeyboardInterrupt), RunDirectory.create(config_in(tmp_path, run_name="mine"), "sft") as run:
        run.save_checkpoint(new_state(tiny_model, tokenizer))
        raise KeyboardInterrupt
    assert (run.path / "checkpoints/step_000000").is_dir()


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
    with RunDirectory.create(config_in(tmp_path, wandb_mode="offline"), "sft") as run:
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
    with RunDirectory.create(config_in(tmp_path, wandb_mode="offline"), "sft") as run:
        run.start_wandb()
        run.log({"train_step": 1})
    assert "wandb did not start (no room) and is off" in capsys.readouterr().out


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, tiny_model, tokenizer):
    config = config_in(tmp_path, wandb_mode="offline", run_name="mine")
    with RunDirectory.create(config, "sft") as run:
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
