"""The table of runs, and two runs compared."""

import subprocess
import sys

import pytest
from tiny import REPOSITORY

from experiments import runs
from experiments.runs import compare_runs, list_runs
from plainrl.config import SFTConfig
from plainrl.records import UserError
from plainrl.run_folder import RunFolder, lock_folder


def config_in(folder, **values):
    return SFTConfig(runs_dir=str(folder), wandb_mode="disabled").model_copy(update=values)


@pytest.fixture
def stopped_run(tmp_path):
    """A run that was killed in step 4, after checkpoints of steps 1 to 3; step 2 scored best."""
    with RunFolder.create(config_in(tmp_path, run_name="mine"), "sft") as run:
        for step, score in ((1, 0.2), (2, 0.4), (3, 0.3)):
            run.log({"train_step": step, "time/step": 1.5})
            (run.path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
            run.log({"eval_step": step, "eval/answer_reward": score, "eval/seconds": 10})
        run.log({"train_step": 4, "time/step": 1.5})
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"train_step": 5, "tr')
    return run


def test_the_table_of_runs(stopped_run):
    lines = list_runs(stopped_run.path.parent).splitlines()
    assert lines[0].split() == "name state step last reward best reward time".split()
    assert lines[1].split() == "mine stopped, can be resumed 4 0.300 0.400 0:00:36".split()
    with pytest.raises(UserError, match="holds no run"):
        list_runs(stopped_run.path)


def test_the_states_of_runs(tmp_path):
    def state():
        return list_runs(tmp_path).splitlines()[1].split()[1]

    with RunFolder.create(config_in(tmp_path, run_name="mine"), "evaluation") as run:
        assert state() == "running"
    assert state() == "stopped"
    run.log({"eval_step": 0, "eval/answer_reward": 0.5})
    assert state() == "finished"  # an evaluation that logged something has no policy to leave
    lock = lock_folder(run.path)  # the table has released the lock again
    lock.close()


def test_the_commands_of_the_table(stopped_run, capsys):
    command = [sys.executable, "-m", "experiments.runs", str(stopped_run.path.parent)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout == list_runs(stopped_run.path.parent) + "\n"
    capsys.readouterr()
    runs.main(["compare", str(stopped_run.path), str(stopped_run.path)])
    assert capsys.readouterr().out.splitlines()[1] == "no setting differs"
    for arguments, message in (
        (["compare", "a"], "usage: uv run python -m experiments.runs"),
        (["compare", "a", "b"], "a is no run"),
        (["none"], "no run"),
    ):
        with pytest.raises(UserError, match=message):
            runs.main(arguments)


def test_two_runs_compared(stopped_run, tmp_path):
    other = RunFolder.create(config_in(tmp_path, run_name="other", learning_rate=0.5), "sft")
    other.log({"eval_step": 0, "eval/answer_reward": 0.25})
    lines = compare_runs(stopped_run.path, other.path).splitlines()
    assert lines[:2] == ["mine -> other", "learning_rate 1e-05 -> 0.5"]
    assert (tmp_path / "compare_mine_other.png").read_bytes().startswith(b"\x89PNG")
