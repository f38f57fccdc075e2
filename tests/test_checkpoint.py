"""Checkpoints are whole or not there; what is restored goes on exactly as what was saved would have."""

import errno
import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
from tiny import new_state, take_step
from transformers import AutoModelForCausalLM

from plainrl import checkpoint
from plainrl.checkpoint import (
    find_damage,
    newest_whole_checkpoint,
    read_record,
    remove_checkpoint,
    remove_leftovers,
    restore,
    seed_everything,
    set_random_states,
    write_checkpoint,
)
from plainrl.records import UserError


@pytest.fixture
def saved(tiny_model, tokenizer, tmp_path):
    """A checkpoint after two steps, and the state that was saved."""
    seed_everything(3)
    state = new_state(tiny_model, tokenizer)
    for step in (1, 2):
        take_step(state, step)
    path = tmp_path / "checkpoints/step_000002"
    write_checkpoint(path, state, {"config": {"seed": 3}, "wandb_run_id": None})
    assert not state.is_being_saved
    return path, state


def test_a_restored_state_goes_on_bit_for_bit(saved, tokenizer):
    path, state = saved
    assert find_damage(path) is None
    for step in (3, 4):
        take_step(state, step)
    seed_everything(99)
    other = new_state(AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32), tokenizer)
    restore(path, other)
    assert (other.step, other.metrics_bytes, other.is_whole) == (2, 20, True)
    for step in (3, 4):
        take_step(other, step)
    for one, two in zip(state.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(one, two)
    assert other.generators == state.generators


def test_restoring_without_the_optimizer_would_differ(saved, tokenizer):
    """The mutation that the test above must catch."""
    path, state = saved
    other = new_state(AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32), tokenizer)
    set_random_states(read_record(path)["random_states"])
    for changed in (state, other):
        set_random_states(read_record(path)["random_states"])
        take_step(changed, 3)
    assert any(not torch.equal(a, b) for a, b in zip(state.policy.parameters(), other.policy.parameters(), strict=True))


def test_a_checkpoint_holds_no_pickle(saved):
    files = {str(file.relative_to(saved[0])) for file in saved[0].rglob("*") if file.is_file()}
    assert {"optimizer.safetensors", "state.json", "manifest.json", "model/model.safetensors"} <= files
    assert all(name.endswith((".safetensors", ".json", ".jinja")) for name in files)
    assert set(json.loads((saved[0] / "manifest.json").read_text())) == files - {"manifest.json"}


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", "model/model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [cut, alter, os.remove, lambda path: path.write_text("{}")])
def test_a_damaged_checkpoint_is_passed_over_and_set_aside(saved, name, damage, capsys):
    newest = saved[0].with_name("step_000003")
    shutil.copytree(saved[0], newest)
    damage(newest / name)
    assert newest_whole_checkpoint([saved[0], newest]) == saved[0]
    assert "step_000003 is damaged and passed over" in capsys.readouterr().out
    assert not newest.exists() and newest.with_name("damaged_step_000003").is_dir()
    assert newest_whole_checkpoint([]) is None


def test_other_training_data_are_refused(saved, tiny_model, tokenizer):
    with pytest.raises(UserError, match="made with other training data"):
        restore(saved[0], new_state(tiny_model, tokenizer, data="other data"))


def test_weights_in_motion_are_not_saved(tiny_model, tokenizer, tmp_path):
    state = new_state(tiny_model, tokenizer)
    tiny_model(torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
    state.optimizer.step()
    with pytest.raises(RuntimeError, match="nothing to save"):
        write_checkpoint(tmp_path / "step_000001", state, {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_saved(saved, bad):
    """Else the next thing would be to remove the good checkpoint before them."""
    path, state = saved
    with torch.no_grad():
        state.policy.get_input_embeddings().weight[3, 5] = bad
    assert state.is_whole and not state.can_be_saved()
    with pytest.raises(UserError, match="infinite or NaN after step 2: they are not saved"):
        write_checkpoint(path.with_name("step_000003"), state, {})
    assert [file.name for file in path.parent.iterdir()] == ["step_000002"]


def test_no_room_is_found_before_anything_is_written(saved, monkeypatch):
    """The earlier checkpoint stays, and the message says how much is missing."""
    path, state = saved
    usage = namedtuple("usage", "total free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(total=10**9, free=10**7))
    with pytest.raises(UserError, match=r"takes 0\.07 GB, 0\.01 GB are free, 0\.06 GB are missing; earlier"):
        write_checkpoint(path.with_name("step_000003"), state, {})
    assert [file.name for file in path.parent.iterdir()] == ["step_000002"]
    assert find_damage(path) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("kind", [OSError, Exception])  # the tokenizers' library raises a bare Exception
@pytest.mark.parametrize("fails_in", ["save_file", "flush_to_disk"])
def test_a_disk_that_fills_up_while_saving_keeps_the_checkpoint_before(saved, monkeypatch, fails_in, kind, number):
    path, state = saved

    def full(*_):
        raise kind(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, fails_in, full)
    with pytest.raises(UserError, match=r"the disk of .*checkpoints is full"):
        write_checkpoint(path.with_name("step_000003"), state, {})
    assert [file.name for file in path.parent.iterdir()] == ["step_000002"]
    assert find_damage(path) is None


def test_other_errors_while_saving_keep_their_traceback(saved, monkeypatch):
    path, state = saved

    def broken(*_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError, match="input/output"):
        write_checkpoint(path.with_name("step_000003"), state, {})


def test_what_a_killed_process_leaves_is_removed(saved):
    run = saved[0].parent.parent
    shutil.copytree(saved[0], saved[0].with_name(".step_000003.unfinished"))
    (run / "stacks_train.txt").touch()
    (run / "stacks_rollout.txt").write_text("Thread 0x1")
    remove_leftovers(run)
    remove_leftovers(run)  # once more changes nothing
    (earlier,) = run.glob("earlier_stacks_rollout_*.txt")
    assert earlier.read_text() == "Thread 0x1"
    assert {file.name for file in run.iterdir()} == {"checkpoints", earlier.name}
    assert [file.name for file in saved[0].parent.iterdir()] == ["step_000002"]
    remove_checkpoint(saved[0])
    assert list(saved[0].parent.iterdir()) == []
