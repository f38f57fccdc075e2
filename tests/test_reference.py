"""The first policy of a KL term: exchanged without a bit lost, loaded again by a resumed run, and the same then."""

import os
import shutil
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from test_GRPO_train import ragged_rollouts, scripted_arguments, scripted_engine, tiny_config  # noqa: F401
from tiny import new_state, train_rows
from transformers import AutoModelForCausalLM

import GRPO_train
from plainrl.guard import StopGuard
from plainrl.lora import add_adapters
from plainrl.policy import score_responses
from plainrl.precision import add_working_copy, refresh_working_copy
from plainrl.records import Stopped, UserError
from plainrl.reference import FINGERPRINT, Reference

TERMS = {"kl_coefficient": 0.5, "kl_estimator": "k2", "entropy_coefficient": 0.01, "n_grpo_steps": 3}


class FolderOfRun:
    """What a reference needs of a run's folder."""

    def __init__(self, path, checkpoint=None):
        self.path, self.checkpoint = path, checkpoint


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["all weights", "adapters", "working copy"])
def test_a_moved_policy_is_scored_as_it_was(tiny_model, tmp_path, kind, temperature):
    settings = {"lora_rank": 4 * (kind == "adapters"), "sampling_temperature": temperature}
    config, rollouts = tiny_config(kl_coefficient=0.1, **settings), ragged_rollouts(tiny_model)
    if kind == "adapters":
        add_adapters(tiny_model, config)
    if kind == "working copy":
        add_working_copy(tiny_model, "bfloat16")
    responses = [rollout.response for rollout in rollouts]
    expected = [score["log_probs"] for score in score_responses(tiny_model, responses, 0, 4, temperature)]
    reference = Reference(tiny_model, FolderOfRun(tmp_path), config)
    move(tiny_model)
    refresh_working_copy(tiny_model)
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    for _ in range(2):
        reference.score(tiny_model, rollouts, 0, config, lambda are_whole: None)
        assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
        for rollout, scores in zip(rollouts, expected, strict=True):
            torch.testing.assert_close(rollout.reference_log_probs, scores, atol=1e-5, rtol=0)
    moved = score_responses(tiny_model, responses, 0, 4, temperature)
    assert any((score["log_probs"] - first).abs().max() > 1e-3 for score, first in zip(moved, expected, strict=True))


def test_an_error_while_scoring_leaves_the_policy_its_own_weights(tiny_model, tmp_path):
    reference = Reference(tiny_model, FolderOfRun(tmp_path), tiny_config(kl_coefficient=0.1))
    move(tiny_model)
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    marks = []
    with pytest.raises(RuntimeError), reference.in_place_of(tiny_model, lambda are_whole: marks.append(are_whole)):
        raise RuntimeError
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert marks == [False, True]


def test_while_the_weights_are_exchanged_nothing_saves_them(tiny_model, tokenizer, tmp_path, monkeypatch):
    """A signal whose grace period is over raises between any two lines, but not here; an error leaves them unsaved."""
    config = tiny_config(kl_coefficient=0.1)
    reference, state = Reference(tiny_model, FolderOfRun(tmp_path), config), new_state(tiny_model, tokenizer)
    guard = StopGuard(state, lambda state: tmp_path, tmp_path)
    guard._requested = signal.SIGTERM
    mark = partial(setattr, state, "is_whole")
    with reference.in_place_of(tiny_model, mark):
        guard._give_up(signal.SIGALRM, None)  # raises nothing
        assert not state.can_be_saved()
    assert state.can_be_saved()
    with pytest.raises(Stopped):
        guard._give_up(signal.SIGALRM, None)

    def broken(policy):
        raise RuntimeError

    monkeypatch.setattr(reference, "_exchange", broken)
    with pytest.raises(RuntimeError), reference.in_place_of(tiny_model, mark):
        pass
    assert not state.can_be_saved()


def test_a_run_that_begins_again_without_a_checkpoint_begins_with_its_new_first_policy(tiny_model, tmp_path):
    found = []
    for _ in range(2):
        Reference(tiny_model, FolderOfRun(tmp_path), tiny_config(kl_coefficient=0.1))
        found.append((tmp_path / FINGERPRINT).read_text())
        move(tiny_model)
    assert found[0] != found[1]


@pytest.mark.usefixtures("cpu_engine", "scripted_engine")
@pytest.mark.parametrize("adapters", [{}, {"lora_rank": 4}])
def test_a_resumed_run_measures_from_the_same_policy(tiny_model_folder, tmp_path, monkeypatch, adapters):
    """Interrupted in its third step, from a warm start; bit for bit the run that was left alone."""
    shutil.copytree(tiny_model_folder, tmp_path / "warm/final")
    first = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    move(first)
    first.save_pretrained(tmp_path / "warm/final")
    settings = TERMS | adapters | {"warm_start": str(tmp_path / "warm/final")}

    def arguments(name):
        return scripted_arguments(tiny_model_folder, tmp_path, run_name=name, **settings)

    GRPO_train.main(arguments("straight"))
    original, calls = GRPO_train.make_rollouts, []

    def with_ctrl_c(*values, **named):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*values, **named)

    monkeypatch.setattr(GRPO_train, "make_rollouts", with_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        GRPO_train.main(arguments("stopped"))
    monkeypatch.setattr(GRPO_train, "make_rollouts", original)
    resumed = [*arguments("stopped"), f"resume={tmp_path / 'stopped'}"]
    fingerprint = tmp_path / "stopped" / FINGERPRINT
    text = fingerprint.read_text()
    fingerprint.write_text("another")
    with pytest.raises(UserError, match="it has changed since .* began with it, and kl_coefficient = 0.5"):
        GRPO_train.main(resumed)
    fingerprint.write_text(text)
    GRPO_train.main(resumed)
    rows = {name: train_rows(tmp_path / name) for name in ("straight", "stopped")}
    of_kl = {name: [row["train/kl"] for row in found] for name, found in rows.items()}
    assert len(of_kl["straight"]) == 3 and of_kl["straight"] == of_kl["stopped"]
    assert of_kl["straight"][0] == pytest.approx(0, abs=1e-9) and of_kl["straight"][2] > 1e-9
    assert [row["train/num_trained_rows"] for row in rows["straight"]] == [8, 8, 8]  # though no response is right
    weights = {name: load_file(tmp_path / name / "final/model.safetensors") for name in rows}
    assert all(torch.equal(value, weights["stopped"][name]) for name, value in weights["straight"].items())
