"""A run's folder holds what was run and what came of it; resumed, it is the run that would have been."""

import datetime
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import REPOSITORY, new_state, take_step

from experiments.runs import list_runs
from plainrl import folder_lock, run_folder
from plainrl.checkpoint_files import describe_files_by_ranks, list_checkpoints
from plainrl.cli import load_config, read_yaml
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.records import UserError
from plainrl.run_folder import RunFolder
from plainrl.run_records import Line, plot_metrics, read_metrics, set_damaged_lines_aside


def config_in(folder, **values):
    return SFTConfig(runs_dir=str(folder), wandb_mode="disabled").model_copy(update=values)


def test_folder_records_configuration_and_environment(tmp_path):
    with RunFolder.create(config_in(tmp_path, run_name="mine", learning_rate=3e-5), "sft") as run:
        assert run.path == tmp_path / "mine"
    saved = yaml.safe_load((run.path / "config.yaml").read_text())
    assert SFTConfig.model_validate(saved) == run.config
    assert saved["learning_rate"] == 3e-5
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["command"]
    assert {"git_commit", "git_diff", "cpu_count", "platform"} <= set(environment)


def test_an_existing_run_is_never_overwritten(tmp_path):
    config = config_in(tmp_path, run_name="mine")
    RunFolder.create(config, "sft")
    with pytest.raises(UserError, match="run_name = mine: .* exists already"):
        RunFolder.create(config, "sft")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    for name in ("other", "."):
        with pytest.raises(UserError, match="exists already"):
            RunFolder.create(config_in(tmp_path, run_name=name), "sft")
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_rank_whose_machine_has_another_folder_of_that_name_says_so(tmp_path, monkeypatch):
    """What the second rank sees of the folder that the first one opened on its machine."""
    config, path = config_in(tmp_path, run_name="mine"), tmp_path / "mine"
    found = (path, config, "process 7 on first")
    monkeypatch.setattr(run_folder, "on_first", lambda call: found)
    for holder in (None, "process 3 on second"):
        if holder:
            path.mkdir()
            (path / "lock").write_text(holder)
        with pytest.raises(UserError, match=f"runs_dir = {tmp_path}: .* does not see {path}"):
            RunFolder.create(config, "sft")
    (path / "lock").write_text("process 7 on first")
    assert RunFolder.create(config, "sft").path == path


def test_a_folder_whose_process_was_killed_before_it_was_a_run_is_taken_over(tmp_path):
    config = config_in(tmp_path, run_name="mine")
    with RunFolder.create(config, "sft") as run:
        (run.path / "config.yaml").rename(run.path / ".config.yaml.unfinished")
    with RunFolder.create(config, "sft") as run:
        assert sorted(file.name for file in run.path.iterdir()) == [
            "config.yaml",
            "environment.json",
            "lock",
            "samples",
        ]


def test_an_unnamed_run_is_named_by_script_and_time_in_its_own_record(tmp_path):
    run = RunFolder.create(config_in(tmp_path), "sft")
    assert run.path.name.startswith("sft-20")
    assert yaml.safe_load((run.path / "config.yaml").read_text())["run_name"] == run.path.name


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make"):
        RunFolder.create(config_in(tmp_path / "file"), "sft")

    def fail(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context, pytest.raises(UserError, match=r"cannot make .*mine \(No space left"):
        context.setattr("plainrl.run_folder.write_durably", fail)
        RunFolder.create(config_in(tmp_path, run_name="mine"), "sft")
    RunFolder.create(config_in(tmp_path, run_name="mine"), "sft")  # the name is free


def test_metrics_are_on_disk_at_once_and_valid_json(tmp_path):
    run = RunFolder.create(config_in(tmp_path), "sft")
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


HOLD = """
import sys
from pathlib import Path
from plainrl.folder_lock import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_by_number_and_host_of_the_first(tmp_path):
    with RunFolder.create(config_in(tmp_path, run_name="mine"), "sft") as run:
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
        RunFolder.open(config, "sft")
    assert "running" in list_runs(tmp_path)
    process.kill()  # a lock does not outlive its process
    process.wait()
    RunFolder.open(config, "sft")


@pytest.fixture
def stopped_run(tmp_path, tiny_model, tokenizer):
    """A run that was killed in step 4, after checkpoints of steps 1 to 3; step 2 scored best."""
    with RunFolder.create(config_in(tmp_path, run_name="mine"), "sft") as run:
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


def test_a_finished_run_without_a_checkpoint_is_not_begun_again(stopped_run):
    """Its model and its metrics would be lost. A sweep with keep_weights=last leaves such runs."""
    shutil.rmtree(stopped_run.path / "checkpoints")
    (stopped_run.path / "final").mkdir()
    before = (stopped_run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="this run is finished, and has no checkpoint to go on from; begin a new run"):
        resumed(stopped_run, "max_steps=50", "resume_with_changes=true")
    assert (stopped_run.path / "final").is_dir() and (stopped_run.path / "metrics.jsonl").read_bytes() == before


def test_another_first_policy_is_refused_by_a_run_that_goes_on_from_a_checkpoint(stopped_run):
    with pytest.raises(UserError, match="^model = other: the run began with smollm2-135m, and goes on with the policy"):
        resumed(stopped_run, "model=other", "resume_with_changes=true")
    with pytest.raises(UserError, match="^model = other: "):  # the run has not recorded its first weights
        resumed(stopped_run, "model=other", "lora_rank=4", "resume_with_changes=true")
    saved = stopped_run.path / "config.yaml"
    with_adapters = saved.read_text().replace("lora_rank: 0", "lora_rank: 4")
    saved.write_text(with_adapters)
    with resumed(stopped_run, "model=other", "resume_with_changes=true"):
        pass  # its folder may have moved, and its weights are compared
    saved.write_text(with_adapters.replace("lora_rank: 4", "lora_rank: 0"))
    shutil.rmtree(stopped_run.path / "checkpoints")
    with resumed(stopped_run, "model=other", "resume_with_changes=true"):
        pass  # nothing was trained yet


def test_samples_of_steps_that_are_done_anew_do_not_stay(stopped_run, tiny_model, tokenizer):
    """The run goes on after step 3, whose evaluation follows its checkpoint."""
    names = [f"rollouts_{step:06d}" for step in (3, 4)] + [f"eval_{step:06d}" for step in (2, 3)]
    names += ["hard/eval_000002", "hard/eval_000003", "eval_all_000003", "mine_2025"]
    for name in names:
        path = stopped_run.path / f"samples/{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}\n")
    (stopped_run.path / "final").mkdir()
    with resumed(stopped_run, "max_steps=50", "resume_with_changes=true") as run:
        assert len(list(run.path.glob("samples/**/*.jsonl"))) == len(names)  # until all is loaded
        go_on(run, tiny_model, tokenizer)
        left = {str(path.relative_to(run.path / "samples")) for path in run.path.glob("samples/**/*.jsonl")}
        assert left == {"rollouts_000003.jsonl", "eval_000002.jsonl", "hard/eval_000002.jsonl", "mine_2025.jsonl"}
        assert not (run.path / "final").exists()


def test_runs_without_a_name_that_start_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    noon = datetime.datetime(2026, 11, 30, 12)
    monkeypatch.setattr(folder_lock, "datetime", SimpleNamespace(datetime=SimpleNamespace(now=lambda: noon)))
    with RunFolder.create(config_in(tmp_path), "sft") as first, RunFolder.create(config_in(tmp_path), "sft") as second:
        assert [first.path.name, second.path.name] == ["sft-20261130-120000", "sft-20261130-120000-2"]
        assert second.config.run_name == second.path.name
    assert folder_lock.new_folder(tmp_path, "sft").name == "sft-20261130-120000-3"
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot make .*link"):
        RunFolder.create(config_in(tmp_path / "link"), "sft")


def resumed(run, *changes):
    config = load_config(SFTConfig, REPOSITORY / "config.yaml", [f"resume={run.path}", *changes])
    return RunFolder.open(config, "sft")


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
    with RunFolder.create(config_in(tmp_path, run_name="mine"), "evaluation") as run:
        run.log({"eval_step": 0, "eval/answer_reward": 0.5})
    assert list_runs(tmp_path).splitlines()[1].split()[:2] == ["mine", "finished"]
    with pytest.raises(UserError, match="this is a run of another script .evaluation, not sft"):
        resumed(run)


def test_another_configuration_file_is_not_ignored_on_resume(stopped_run):
    same, other = stopped_run.path.parent / "same.yaml", stopped_run.path.parent / "other.yaml"
    preset = read_yaml(stopped_run.path / "config.yaml")["preset"]
    same.write_text(f"preset: auto\nseed: 5\npresets:\n  {preset}: {{seed: 0}}\n  another: {{seed: 7}}\n")
    other.write_text("seed: 5\n")
    arguments = ["resume=auto", f"runs_dir={stopped_run.path.parent}", f"config={other}"]
    with pytest.raises(UserError, match="settings differ from the run's own: seed 0 -> 5; leave them out"):
        load_config(SFTConfig, REPOSITORY / "config.yaml", arguments)
    again = [*arguments[:2], f"config={same}"]
    assert load_config(SFTConfig, REPOSITORY / "config.yaml", again).resume == str(stopped_run.path)
    with pytest.raises(UserError, match="run_name = other: .* keeps its name and its place; leave run_name out"):
        load_config(SFTConfig, REPOSITORY / "config.yaml", [f"resume={stopped_run.path}", "run_name=other"])
    assert load_config(SFTConfig, REPOSITORY / "config.yaml", [*arguments, "run_name=new"]).run_name == "new"


def test_a_torn_newest_checkpoint_is_reported_and_passed_over(stopped_run, tiny_model, tokenizer, capsys):
    weights = stopped_run.path / "checkpoints/step_000003/optimizer.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with resumed(stopped_run) as run:
        go_on(run, tiny_model, tokenizer)
        assert run.checkpoint == run.path / "checkpoints/step_000002"
        assert [row["train_step"] for row in run.read_metrics() if "train_step" in row] == [1, 2]
    assert "step_000003 is damaged and passed over (optimizer.safetensors is not what" in capsys.readouterr().out


def test_a_run_without_a_whole_checkpoint_starts_again(tmp_path, tiny_model, tokenizer, capsys):
    with RunFolder.create(config_in(tmp_path, run_name="mine"), "sft") as run:
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


def test_metrics_that_were_edited_below_the_checkpoint_are_not_cut_inside_a_line(stopped_run):
    """A line was removed: the rows after it moved, so that the place of the checkpoint lies inside a later one."""
    path = stopped_run.path / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"was changed: no line ends at byte \d+, .* put the file back, or start a new"):
        resumed(stopped_run)


@pytest.mark.parametrize("damage", [b"\0" * 20, b"\xff" * 20, b'{"train_step": "a", '])
def test_a_damaged_line_is_set_aside_and_the_run_goes_on(stopped_run, tiny_model, tokenizer, capsys, damage):
    """The rows before and after it stay, the file as it was is kept, and the checkpoint still counts its bytes."""
    path = stopped_run.path / "metrics.jsonl"
    with path.open("r+b") as file:
        file.write(damage)
    damaged = path.read_bytes()
    with pytest.raises(UserError, match=rf"{path}, line 1 is damaged: "):
        stopped_run.read_metrics()
    with resumed(stopped_run) as run:
        assert go_on(run, tiny_model, tokenizer).step == 3
        assert [row.get("train_step") for row in run.read_metrics()] == [None, None, 2, None, 3]
        assert run.read_metrics()[0] == {}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "was damaged" in line]
    kept = path.with_name("damaged_metrics.jsonl")
    assert line == f"warning: {path} was damaged in line 1: these rows are lost; the file as it was is {kept}"
    assert kept.read_bytes().startswith(damage) and damaged.startswith(kept.read_bytes())
    with resumed(run):  # and once more: nothing is damaged now
        pass
    assert "was damaged" not in capsys.readouterr().out


def test_a_damaged_last_row_does_not_set_the_count_of_optimizer_steps_back(tmp_path, tiny_model, tokenizer):
    """One step may take several optimizer steps. Their number is in the checkpoint, and goes on to the next one."""
    with RunFolder.create(config_in(tmp_path, run_name="mine"), "sft") as run:
        state = new_state(tiny_model, tokenizer)
        for step in (1, 2):
            run.log({"train_step": 8 * step})
            run.complete_step(state, step)
            run.save_checkpoint(state)
    path = run.path / "metrics.jsonl"
    first, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\0" * (len(last) - 1) + b"\n")
    with resumed(run) as run:
        state = go_on(run, tiny_model, tokenizer)
        assert (run.read_metrics(), run.last_train_step()) == ([{"train_step": 8}, {}], 16)
        run.complete_step(state, 3)
        run.save_checkpoint(state)
    with resumed(run) as run:
        go_on(run, tiny_model, tokenizer)
        assert run.last_train_step() == 16


def test_lines_too_short_for_an_empty_row_are_set_aside_too(tmp_path):
    """Of one byte and of two: the lengths stay, and every line can be read."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'x\n{"a": 1}\nxy\nxyz\n\n')
    set_damaged_lines_aside(tmp_path)
    assert path.read_bytes() == b' \n{"a": 1}\n{}\n{} \n\n'
    assert read_metrics(tmp_path) == [{}, {"a": 1}, {}, {}, {}]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples", "checkpoints", "final", "lock", "config.yaml"])
@pytest.mark.parametrize("kind", ["folder or file", "dangling link"])
def test_what_is_not_of_its_kind_is_named_before_anything_is_done(tmp_path, name, kind):
    """A file in place of a folder, a folder in place of a file, or a link to nothing."""
    with RunFolder.create(config_in(tmp_path, run_name="mine"), "sft") as run:
        run.log({"train_step": 1})
    path = run.path / name
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    if kind == "dangling link":
        path.symlink_to(run.path / "no/thing")
    elif name in ("samples", "checkpoints", "final"):
        path.touch()
    else:
        path.mkdir()
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        resumed(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", '{"script": 5}', '{"script": "sf', "\0\0", "[" * 100_000])
def test_a_run_that_does_not_say_its_script_has_a_way_out(stopped_run, text, tiny_model, tokenizer):
    path = stopped_run.path / "environment.json"
    path.write_text(text)
    advice = re.escape(
        f'{path} does not say which script made this run; put the file back, or write {{"script": "sft"}}'
    )
    with pytest.raises(UserError, match=advice):
        resumed(stopped_run)
    path.write_text('{"script": "sft"}')
    with resumed(stopped_run) as run:
        assert go_on(run, tiny_model, tokenizer).step == 3


def test_a_folder_that_may_not_be_written_is_one_line(stopped_run, monkeypatch):
    """As in another user's folder. The tests may run as root, who may write everywhere: the refusals are played."""
    path = stopped_run.path

    def refuse(file, *arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    with (
        monkeypatch.context() as context,
        pytest.raises(UserError, match=r"cannot be written \(Permission denied: .*lock"),
    ):
        context.setattr("pathlib.Path.open", refuse)
        RunFolder.open(stopped_run.config.model_copy(update={"resume": str(path)}), "sft")
    monkeypatch.setattr("os.access", lambda file, mode: not (str(file).endswith("metrics.jsonl") and mode & os.W_OK))
    with pytest.raises(UserError, match=r"metrics.jsonl may not be read and written by you: copy .*mine, and resume"):
        resumed(stopped_run)


def test_auto_passes_over_a_folder_of_another_user(stopped_run, monkeypatch):
    arguments = ["resume=auto", f"runs_dir={stopped_run.path.parent}"]
    monkeypatch.setattr("os.access", lambda file, mode: not str(file).endswith("lock"))
    assert load_config(SFTConfig, REPOSITORY / "config.yaml", arguments).resume == ""


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunFolder.create(config_in(tmp_path, run_name="mine"), "sft") as run:
        run.log({"train_step": 1})
    warning = f"warning: {run.path} cannot be locked ({os.strerror(number)}): let no other process write to it\n"
    assert warning in capsys.readouterr().out
    with resumed(run):
        assert warning in capsys.readouterr().out
    assert list_runs(tmp_path).splitlines()[1].split()[:2] == ["mine", "unknown"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples/rollouts_000001.jsonl", "training.png"])
def test_a_disk_that_fills_up_anywhere_in_a_run_is_one_line_and_no_row_is_half_kept(
    stopped_run, tiny_model, tokenizer, name
):
    """The device /dev/full takes no byte: the row, the samples, the figure end with `No space left on device`."""
    with (
        pytest.raises(UserError, match=r"the disk of .*mine is full .*free disk space, then go on with resume=.*mine"),
        resumed(stopped_run) as run,
    ):
        go_on(run, tiny_model, tokenizer)
        path = run.path / name
        if name == "metrics.jsonl":
            path.rename(run.path / "kept")
        path.symlink_to("/dev/full")
        if name == "metrics.jsonl":
            run.log({"train_step": 4})
        elif name == "training.png":
            plot_metrics({"loss": [Line(run.read_metrics(), "train_step", "time/step", "all")]}, path)
        else:
            path.write_text("a row\n")
    path.unlink()
    if name == "metrics.jsonl":
        (run.path / "kept").rename(path)
    with resumed(stopped_run) as run:
        assert go_on(run, tiny_model, tokenizer).step == 3


def test_a_folder_that_disappears_during_the_run_is_one_line(tmp_path):
    with (
        pytest.raises(UserError, match=r"mine was removed or renamed during the run \(.*No such file"),
        RunFolder.create(config_in(tmp_path, run_name="mine"), "sft") as run,
    ):
        run.log({"train_step": 1})
        run.path.rename(tmp_path / "other")
        run.log({"train_step": 2})


@pytest.mark.parametrize("error", [BrokenPipeError(), FileNotFoundError("a bug")])
def test_an_error_before_anything_was_run_stays_what_it_is(tmp_path, error):
    """The folder is removed so that the name is free. It is not said to have been lost."""
    with pytest.raises(type(error)), RunFolder.create(config_in(tmp_path, run_name="mine"), "sft"):
        raise error
    assert not (tmp_path / "mine").exists()


def test_what_an_evaluation_has_sampled_stays_if_another_of_its_sets_fails(tmp_path):
    """Metrics are logged once, after all sets. The responses of the first are written before."""
    with pytest.raises(RuntimeError), RunFolder.create(config_in(tmp_path, run_name="mine"), "eval") as run:
        (run.path / "samples/eval_000000.jsonl").write_text("{}\n")
        raise RuntimeError("the second set")
    assert (tmp_path / "mine/samples/eval_000000.jsonl").exists()


@pytest.mark.parametrize(
    ("number", "message"), [(errno.EIO, "x: Input/output error; "), (errno.ENOSPC, "the disk of ")]
)
def test_what_is_refused_before_anything_was_run_names_no_folder_to_go_on_with(tmp_path, number, message):
    """The folder is removed, so there is nothing to resume."""
    with (
        pytest.raises(UserError, match=rf"^{message}.*then start again$"),
        RunFolder.create(config_in(tmp_path, run_name="mine"), "sft"),
    ):
        raise OSError(number, os.strerror(number), "x")
    assert not (tmp_path / "mine").exists()


def test_what_the_system_refuses_during_a_run_is_one_line_with_the_way_to_go_on(tmp_path):
    with (
        pytest.raises(UserError, match=r"x: Input/output error; .*; then go on with resume=.*mine"),
        RunFolder.create(config_in(tmp_path, run_name="mine"), "sft") as run,
    ):
        run.log({"train_step": 1})
        raise OSError(errno.EIO, os.strerror(errno.EIO), "x")
    with pytest.raises(FileNotFoundError), resumed(run):  # may be a bug: it keeps its traceback
        (tmp_path / "missing").read_text()


def test_copies_beside_the_checkpoints_are_no_checkpoints(stopped_run, tiny_model, tokenizer):
    """And the newest is that of the highest step, whatever the number of its digits."""
    checkpoints = stopped_run.path / "checkpoints"
    for name in ("step_000003_copy", "step_000003.bak", "step_x"):
        shutil.copytree(checkpoints / "step_000003", checkpoints / name)
    (checkpoints / "step_000002").rename(checkpoints / "step_1000000")
    assert [path.name for path in list_checkpoints(stopped_run.path)] == ["step_000001", "step_000003", "step_1000000"]
    stopped_run.prune_checkpoints(keep_last=1, keep_best=False)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        *("step_000003.bak", "step_000003_copy", "step_1000000", "step_x")
    ]


def test_a_run_of_before_the_newest_keys_is_resumed_without_a_change(stopped_run, tiny_model, tokenizer, capsys):
    """Neither its config.yaml nor its checkpoints know the keys."""
    new_keys = ("dropout", "drop_long_examples")
    config = stopped_run.path / "config.yaml"
    config.write_text(
        yaml.safe_dump({k: v for k, v in yaml.safe_load(config.read_text()).items() if k not in new_keys})
    )
    checkpoint = stopped_run.path / "checkpoints/step_000003"
    record = json.loads((checkpoint / "state.json").read_text())
    for key in new_keys:
        del record["config"][key]
    (checkpoint / "state.json").write_text(json.dumps(record))
    (checkpoint / "manifest.json").write_text(json.dumps(describe_files_by_ranks(checkpoint)))
    with resumed(stopped_run) as run:
        assert go_on(run, tiny_model, tokenizer).step == 3
    assert "changed" not in capsys.readouterr().out
    assert yaml.safe_load(config.read_text())["dropout"] is False
    with resumed(stopped_run, "dropout=true", "resume_with_changes=true"):
        pass
    assert "changed since the checkpoint: dropout False -> True" in capsys.readouterr().out


def test_samples_that_were_removed_for_their_space_are_no_loss(stopped_run, tiny_model, tokenizer):
    shutil.rmtree(stopped_run.path / "samples")
    with resumed(stopped_run) as run:
        go_on(run, tiny_model, tokenizer)
        assert (run.path / "samples").is_dir()


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
        with RunFolder.create(config, "x") as run:
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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("CUDA Error: out of memory. Tried to allocate 2.00 GiB."),  # as vLLM's sleep mode says it
    ],
)
def test_out_of_memory_on_a_gpu_names_the_three_settings(tmp_path, error):
    with pytest.raises(UserError) as caught, RunFolder.create(config_in(tmp_path), "sft") as run:
        run.log({"train_step": 1})
        raise error
    message = str(caught.value)
    for setting in ("microbatch_tokens", "gradient_checkpointing=true", "gpu_memory_utilization"):
        assert setting in message
    assert "Tried to allocate 2.00 GiB" in message


def test_a_signal_before_the_first_metrics_keeps_a_state_that_was_saved(tmp_path, tiny_model, tokenizer):
    with pytest.raises(KeyboardInterrupt), RunFolder.create(config_in(tmp_path, run_name="mine"), "sft") as run:
        run.save_checkpoint(new_state(tiny_model, tokenizer))
        raise KeyboardInterrupt
    assert (run.path / "checkpoints/step_000000").is_dir()
