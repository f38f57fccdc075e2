"""A run that was killed and resumed is the run that would have been, bit for bit, with the real engine."""

import importlib
from functools import partial
from pathlib import Path

import pytest
import torch
from kill_and_resume import RUNS, find_differences, find_torn, kill, start, steps_of, wait_for
from safetensors.torch import load_file

SETTINGS = {
    "SFT": {"max_steps": 4, "eval_interval": 2},
    "GRPO on-policy": {"n_grpo_steps": 3, "eval_interval": 2},
    "GRPO off-policy": {"n_grpo_steps": 3, "eval_interval": 2},
}


def run_killed_and_resumed(name, background):
    """Kill a run while it saves its second checkpoint, and resume it; return what is to be looked at."""
    script, arguments_of, settings = RUNS[name]
    folder = background.new_folder("runs")
    settings = settings | SETTINGS[name] | {"run_name": "killed"}

    def run(**more):
        arguments = arguments_of(background.answering_model, folder, **settings | more)
        return start(script, arguments, folder / "killed.log", background.start)

    killed = run()
    wait_for(lambda: any(folder.glob("killed/checkpoints/*step_000002*")), killed)
    kill(killed)
    torn = find_torn(folder / "killed")
    return folder / "killed", killed.returncode, torn, run(resume="auto").wait()


KILLED = {name: partial(run_killed_and_resumed, name) for name in RUNS}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.background(job=KILLED[name])) for name in RUNS])
def test_a_killed_and_resumed_run_is_the_run_that_would_have_been(
    name, background, answering_model_folder, engine, tmp_path, monkeypatch
):
    """The killed run and the resumed one are processes with engines of their own; the run left alone is made here."""
    script, arguments_of, settings = RUNS[name]
    settings = settings | SETTINGS[name] | {"run_name": "straight"}
    monkeypatch.setattr("policy_evaluation.init_vllm", lambda *_, **__: engine)
    importlib.import_module(Path(script).stem).main(arguments_of(answering_model_folder, tmp_path, **settings))

    folder, killed_status, torn, resumed_status = background.result(KILLED[name])
    assert killed_status == -9
    assert torn == []
    assert resumed_status == 0, folder.with_suffix(".log").read_text()[-3000:]
    assert find_differences(tmp_path / "straight", folder) == []
    assert steps_of(folder) == list(range(1, len(steps_of(folder)) + 1))
    assert (folder / "environment_resumed_000001.json").exists() or (
        folder / "environment_resumed_000002.json"
    ).exists()

    first = load_file(f"{answering_model_folder}/model.safetensors")
    last = load_file(folder / "final/model.safetensors")
    assert any(not torch.equal(first[key], last[key]) for key in first)  # there was something to lose


def test_differences_between_runs_are_found(tmp_path):
    """The comparison above must be able to fail: in a metric, a sample, a weight."""
    for name in ("one", "other"):
        for file in ("metrics.jsonl", "samples/a.jsonl", "final/m.safetensors", "checkpoints/1/optimizer.safetensors"):
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"train_step": 1, "train/loss": 1.0, "time/step": 2.0}\n')
    one, other = tmp_path / "one", tmp_path / "other"
    assert find_differences(one, other) == []
    (other / "metrics.jsonl").write_text('{"train_step": 1, "train/loss": 1.0, "time/step": 3.0}\n')
    assert find_differences(one, other) == []
    (other / "metrics.jsonl").write_text('{"train_step": 1, "train/loss": 1.5}\n')
    assert len(find_differences(one, other)) == 1
    for file in ("samples/a.jsonl", "final/m.safetensors", "checkpoints/1/optimizer.safetensors"):
        (other / file).write_text("x")
    assert len(find_differences(one, other)) == 4
