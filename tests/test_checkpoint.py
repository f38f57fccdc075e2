"""Checkpoints are whole or not there; what is restored goes on exactly as what was saved would have."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from tiny import REPOSITORY, new_state, take_step
from transformers import AutoModelForCausalLM

from plainrl import checkpoint, checkpoint_files
from plainrl.checkpoint import (
    TrainingState,
    optimizer_tensors,
    remove_checkpoint,
    remove_leftovers,
    restore,
    seed_everything,
    set_random_states,
    write_checkpoint,
)
from plainrl.checkpoint_files import describe_files, find_damage, list_files, newest_whole_checkpoint, read_record
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.data import epoch_order
from plainrl.lean_layers import keep_less
from plainrl.policy import prepare_training
from plainrl.records import UserError
from plainrl.selection import QuestionOrder


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


def test_a_signal_while_a_step_is_completed_saves_nothing_half(tiny_model, tokenizer):
    """The position in the data belongs to the step. Between the two the state must not count as whole."""
    seen = []
    order = SimpleNamespace(state_dict=lambda: seen.append(state.is_whole) or {"next": 4})
    state = new_state(tiny_model, tokenizer)
    state.order = order
    state.complete_step(1, 10)
    assert seen == [False] and state.is_whole and state.order_state == {"next": 4}


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
    # Several ranks gather the moments in this order, and it decides which file they stand in.
    names = [list(optimizer_tensors(each.policy, each.optimizer)) for each in (state, other)]
    assert names[0] == names[1]


@pytest.mark.parametrize("was_grouped", [True, False])
def test_moments_find_their_parameters_in_an_optimizer_of_two_groups(tiny_model, tokenizer, tmp_path, was_grouped):
    """Its indices count through the groups. An older checkpoint was written by an optimizer of one group."""
    config = SFTConfig(learning_rate=1e-3, weight_decay=0.1 if was_grouped else 0.0)
    state = new_state(tiny_model, tokenizer)
    if was_grouped:
        state = TrainingState(tiny_model, tokenizer, prepare_training(tiny_model, config), state.data_fingerprint)
    else:
        state.optimizer.param_groups[0]["weight_decay"] = 0.0
        keep_less(tiny_model)  # as `prepare_training` does: another order of operations rounds otherwise
    take_step(state, 1)
    write_checkpoint(tmp_path / "step_000001", state, {"config": {}, "wandb_run_id": None})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "step_000001/model", dtype=torch.float32)
    optimizer = prepare_training(model, config)
    assert len(optimizer.param_groups) == 2
    other = TrainingState(model, tokenizer, optimizer, state.data_fingerprint)
    restore(tmp_path / "step_000001", other)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [config.weight_decay, 0.0]
    states = [
        {name: changed.optimizer.state[parameter] for name, parameter in changed.policy.named_parameters()}
        for changed in (state, other)
    ]
    for name, moments in states[0].items():
        assert all(torch.equal(value, states[1][name][key]) for key, value in moments.items()), name
    for changed in (state, other):
        set_random_states(read_record(tmp_path / "step_000001")["random_states"])
        take_step(changed, 2)
    for one, two in zip(state.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_order_of_data_is_saved_as_it_was_after_the_last_step(tiny_model, tokenizer, tmp_path):
    """Not as it is in the middle of the next step, when a signal comes; a checkpoint of before has none."""
    config = GRPOConfig(preset="laptop", rollout_batch_size=16, train_batch_size=16, gradient_accumulation_steps=1)
    state = new_state(tiny_model, tokenizer)
    state.order = QuestionOrder(5, config)
    assert state.order.draw(2) == epoch_order(5, 2, config.seed)
    state.complete_step(1, metrics_bytes=10)
    state.order.draw(2)
    write_checkpoint(tmp_path / "checkpoints/step_000001", state, {})
    other = new_state(tiny_model, tokenizer)
    other.order = QuestionOrder(5, config)
    restore(tmp_path / "checkpoints/step_000001", other)
    assert other.order.draw(3) == epoch_order(5, 5, config.seed)[2:]
    assert other.order_state == {"position": 2, "visits": {}}

    record = read_record(tmp_path / "checkpoints/step_000001")
    del record["data_order"]
    (tmp_path / "checkpoints/step_000001/state.json").write_text(json.dumps(record | {"step": 2}))
    restore(tmp_path / "checkpoints/step_000001", other)
    assert other.order.draw(1) == epoch_order(5, 5, config.seed)[4:]  # two steps of 16 / 8 questions


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


def test_files_that_other_programs_leave_do_no_damage(saved):
    for name in (".DS_Store", "model/README.md", ".cache/upload/lock"):
        (saved[0] / name).parent.mkdir(parents=True, exist_ok=True)
        (saved[0] / name).write_text("x")
    assert find_damage(saved[0]) is None
    (saved[0] / "model/adapter_config.json").write_text("{}")  # Transformers would read it
    assert find_damage(saved[0]) == "model/adapter_config.json is not in manifest.json"


def test_of_two_ranks_each_hashes_its_share(saved, monkeypatch):
    mine, others = (describe_files(saved[0], list_files(saved[0])[number::2]) for number in (0, 1))
    assert mine and others and not mine.keys() & others.keys()
    original, hashed = checkpoint_files._sha256, []

    def sha256(path):
        hashed.append(str(path.relative_to(saved[0])))
        return original(path)

    monkeypatch.setattr(checkpoint_files, "_sha256", sha256)
    monkeypatch.setattr(checkpoint_files, "num_ranks", lambda: 2)
    monkeypatch.setattr(checkpoint_files, "exchange", lambda share: [share, others])
    monkeypatch.setattr(checkpoint_files, "on_first", lambda call: call())
    assert find_damage(saved[0]) is None and sorted(hashed) == sorted(mine)


def test_other_training_data_are_refused(saved, tiny_model, tokenizer):
    with pytest.raises(UserError, match="made with other training data"):
        restore(saved[0], new_state(tiny_model, tokenizer, data="other data"))


def test_weights_in_motion_are_not_saved(tiny_model, tokenizer, tmp_path):
    state = new_state(tiny_model, tokenizer)
    tiny_model(torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
    state.optimizer.step()
    with pytest.raises(RuntimeError, match="nothing to save"):
        write_checkpoint(tmp_path / "step_000001", state, {})


def test_the_weights_of_all_ranks_are_looked_at(tiny_model, tokenizer, monkeypatch):
    """Each at its shares, of which some may be empty."""
    tiny_model.register_parameter("share", torch.nn.Parameter(torch.zeros(0, 4)))
    state, asked = new_state(tiny_model, tokenizer), []
    monkeypatch.setattr("plainrl.checkpoint.exchange", lambda own: asked.append(own) or [own, len(asked) < 2])
    assert state.can_be_saved() and not state.can_be_saved()  # the second time the other rank has NaN
    assert asked == [True, True]


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


def test_a_state_counts_as_being_saved_while_it_is(saved, monkeypatch):
    """A signal's time of grace must not end within."""
    (path, state), seen, original = saved, [], checkpoint.save_share

    def watched(one, folder):
        seen.append(one.is_being_saved)
        return original(one, folder)

    monkeypatch.setattr(checkpoint, "save_share", watched)
    write_checkpoint(path.with_name("step_000003"), state, {})
    assert seen == [True] and not state.is_being_saved


def test_no_room_is_found_before_anything_is_written(saved, monkeypatch):
    """The earlier checkpoint stays, and the message says how much is missing."""
    path, state = saved
    usage = namedtuple("usage", "total free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(total=10**9, free=10**7))
    monkeypatch.setattr(checkpoint, "save_share", lambda *_: pytest.fail("something was written"))
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
    for name in (".preflight", ".final.unfinished"):
        (run / name).mkdir()
    remove_leftovers(run)
    remove_leftovers(run)  # once more changes nothing
    (earlier,) = run.glob("earlier_stacks_rollout_*.txt")
    assert earlier.read_text() == "Thread 0x1"
    assert {file.name for file in run.iterdir()} == {"checkpoints", earlier.name}
    assert [file.name for file in saved[0].parent.iterdir()] == ["step_000002"]
    remove_checkpoint(saved[0])
    assert list(saved[0].parent.iterdir()) == []


def test_who_only_looks_at_checkpoints_does_not_wait_for_transformers():
    """The table of runs and sweeps import this module, too."""
    code = "import sys, plainrl.checkpoint; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=300).returncode == 0
