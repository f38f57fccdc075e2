"""The table of runs, and two runs compared."""

import subprocess
import sys

import pytest
import yaml
from tiny import REPOSITORY

from experiments import runs
from experiments.runs import compare_settings, list_runs
from plainrl.config import SFTConfig
from plainrl.devices import run_command
from plainrl.folder_lock import lock_folder
from plainrl.records import UserError
from plainrl.run_folder import RunFolder


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


def test_the_steps_of_an_off_policy_run_are_rollout_batches(tmp_path):
    """As in its page and its key n_grpo_steps: two batches of four optimizer steps each."""
    with RunFolder.create(config_in(tmp_path, run_name="mine"), "grpo") as run:
        for step in range(1, 9):
            run.log({"train_step": step, "rollout/reward": 0.5} | ({"time/step": 1.0} if step % 4 == 0 else {}))
        run.log({"eval_step": 2, "eval/answer_reward": 0.25, "eval/seconds": 1.0})
    assert list_runs(tmp_path).splitlines()[1].split() == "mine stopped 2 0.250 0.250 0:00:03".split()


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
        (["compare", "a"], f"usage: {run_command('python -m experiments.runs')}"),
        (["compare", "a", "b"], "a is no run"),
        (["compare", "a", "b", "c.xyz"], "^compare: the figure c.xyz is no .png; name it c.png$"),
        (["compare", "a", "b", "c"], "^compare: the figure c is no .png; name it c.png$"),
        (["none"], "no run"),
    ):
        with pytest.raises(UserError, match=message):
            runs.main(arguments)


def test_two_runs_compared(stopped_run, tmp_path, capsys):
    other = RunFolder.create(config_in(tmp_path, run_name="other", learning_rate=0.5), "sft")
    other.log({"eval_step": 0, "eval/answer_reward": 0.25})
    figure = tmp_path / "compare_mine_other.png"
    runs.main(["compare", str(stopped_run.path), str(other.path)])
    assert capsys.readouterr().out.splitlines() == [
        "mine -> other",
        "learning_rate 1e-05 -> 0.5",
        f"curves: {figure}",
    ]
    assert figure.read_bytes().startswith(b"\x89PNG")

    figure.unlink()
    figure.mkdir()  # as good as a folder of another user: the figure cannot be written
    message = rf"the figure {figure} cannot be written \(Is a directory\); name another file: .* compare .* FIGURE.png"
    with pytest.raises(UserError, match=message):
        runs.main(["compare", str(stopped_run.path), str(other.path)])
    assert capsys.readouterr().out.splitlines()[1] == "learning_rate 1e-05 -> 0.5"  # said all the same
    runs.main(["compare", str(stopped_run.path), str(other.path), str(tmp_path / "mine.png")])
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")


def test_a_key_that_an_older_run_lacks_has_its_default_in_the_comparison(stopped_run, tmp_path):
    other = RunFolder.create(config_in(tmp_path, run_name="other"), "sft").path
    values = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "dropout"}))
    assert compare_settings(stopped_run.path, other) == ["mine -> other", "no setting differs"]
    (other / "config.yaml").write_text(yaml.safe_dump(values | {"dropout": True}))
    assert compare_settings(stopped_run.path, other)[1:] == ["dropout False -> True"]
    (other / "config.yaml").write_text("n_grpo_steps: 3\n")  # another script: every key is shown
    assert "num_epochs 1.0 -> None" in compare_settings(stopped_run.path, other)


@pytest.mark.parametrize(
    "line",
    [
        b'{"train_step": 4, "tr\n',
        b"\0" * 30 + b"\n",
        b"\xff\xfe\n",
        b"5\n",
        b'{"train_step": "4"}\n',
        b'{"eval/answer_reward": NaN}\n',
        b'{"time/step": 1e999}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_one_damaged_line_does_not_hide_the_other_runs(stopped_run, tmp_path, line):
    other = RunFolder.create(config_in(tmp_path, run_name="other"), "sft")
    with (other.path / "metrics.jsonl").open("wb") as file:
        file.write(b'{"train_step": 3}\n' + line + b'{"train_step": 5}\n')
    lines = list_runs(tmp_path).splitlines()
    assert lines[1].split() == "mine stopped, can be resumed 4 0.300 0.400 0:00:36".split()
    assert lines[2].split() == "other running ? ? ? ?".split()
    assert lines[3].startswith(f"damaged: {other.path / 'metrics.jsonl'}, line 2 is damaged: ")
    assert len(lines) == 4


def test_a_run_without_figures_and_one_with_strange_files_are_shown(stopped_run, tmp_path):
    for name in ("folder", "dangling", "nulls"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
    (tmp_path / "folder/metrics.jsonl").mkdir()
    (tmp_path / "folder/lock").mkdir()
    (tmp_path / "folder/environment.json").write_text("[1]")
    (tmp_path / "dangling/metrics.jsonl").symlink_to(tmp_path / "nothing")
    (tmp_path / "nulls/metrics.jsonl").write_text(
        '{"train_step": null, "eval/answer_reward": null, "time/step": 1e300}\n'
    )
    lines = {line.split()[0]: line.split() for line in list_runs(tmp_path).splitlines()[1:5]}
    assert lines["folder"] == "folder unknown ? ? ? ?".split()
    assert lines["dangling"] == "dangling stopped ? ? ? ?".split()
    assert lines["nulls"][:5] == "nulls stopped 0 - -".split()
    assert lines["mine"][-2:] == ["0.400", "0:00:36"]
