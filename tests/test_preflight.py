"""What a run needs later is tried before its first step: the scores, saving, reading back, room on the disk."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from plainrl import preflight as module
from plainrl.checkpoint import SPARE_BYTES
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.policy import load_policy
from plainrl.precision import working_copy
from plainrl.preflight import check_room, check_saving, check_scores, preflight
from plainrl.records import UserError

GIB = 2**30


def config_of(folder, schema=GRPOConfig, **values):
    return schema(model=folder, max_context_tokens=256, sampling_max_tokens=8, **values)


@pytest.fixture
def loaded(tiny_model_folder):
    return load_policy(config_of(tiny_model_folder))


def test_a_sound_run_leaves_no_trace(loaded, tiny_model_folder, tmp_path):
    """Nor does it draw random numbers or change the policy's mode. It is fast."""
    policy, tokenizer = loaded
    before = torch.get_rng_state()
    started = time.perf_counter()
    preflight(policy, tokenizer, tmp_path, config_of(tiny_model_folder, gradient_checkpointing=True))
    assert time.perf_counter() - started < 10
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(tmp_path.iterdir()) and not policy.training
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_working_copy_is_held_to_the_limit_of_its_own_dtype(tiny_model_folder, dtype, monkeypatch):
    """As on a GPU, where the copy is what is checked. Rounding alone exceeds the limit of float32."""
    config = config_of(tiny_model_folder, compute_dtype=dtype)
    copy = working_copy(load_policy(config)[0])
    check_scores(copy, config)
    monkeypatch.setitem(module.MOST_SCORE_DIFFERENCE, getattr(torch, dtype), 1e-6)
    with pytest.raises(UserError, match="not those of the plain model"):
        check_scores(copy, config)


def test_dropout_that_is_left_is_found(tiny_model_folder):
    """Also where no configuration names it."""
    policy, _ = load_policy(config_of(tiny_model_folder))
    block = policy.model.layers[0]
    block.mlp.down_proj = torch.nn.Sequential(block.mlp.down_proj, torch.nn.Dropout(0.5))
    with pytest.raises(UserError, match="its scores in training are not those of the plain model; .* nats"):
        check_scores(policy, config_of(tiny_model_folder))
    check_scores(policy, config_of(tiny_model_folder, SFTConfig, dropout=True))


def test_logits_that_change_behind_the_output_layer_are_found(tiny_model_folder):
    policy, _ = load_policy(config_of(tiny_model_folder))
    forward = policy.forward

    def scaled(*arguments, **options):
        outputs = forward(*arguments, **options)
        outputs.logits = 0.5 * outputs.logits
        return outputs

    policy.forward = scaled
    with pytest.raises(UserError, match="its scores in training are not those of the plain model"):
        check_scores(policy, config_of(tiny_model_folder))


def test_a_model_that_sees_later_tokens_is_found(tiny_model_folder, monkeypatch):
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    for layer in policy.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UserError, match="its scores depend on later tokens; use a causal language model"):
        check_scores(policy, config_of(tiny_model_folder))


def test_scores_that_are_nan_are_found(tiny_model_folder):
    policy, _ = load_policy(config_of(tiny_model_folder))
    with torch.no_grad():
        policy.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="its scores are infinite or NaN; use another model"):
        check_scores(policy, config_of(tiny_model_folder))


def test_checkpointing_that_a_model_lacks_is_named(loaded, tiny_model_folder, tmp_path, monkeypatch):
    policy, tokenizer = loaded
    monkeypatch.setattr(type(policy), "supports_gradient_checkpointing", False)
    preflight(policy, tokenizer, tmp_path, config_of(tiny_model_folder))
    with pytest.raises(UserError, match="^gradient_checkpointing = true: llama does not support it; set it to false$"):
        preflight(policy, tokenizer, tmp_path, config_of(tiny_model_folder, gradient_checkpointing=True))


def test_blocks_to_compile_are_looked_for(tiny_model_folder, tokenizer, tmp_path):
    policy = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=512, attn_pdrop=0, resid_pdrop=0))
    policy.config.embd_pdrop = policy.transformer.drop.p = 0
    config = config_of(tiny_model_folder, compile_policy=True)
    preflight(policy, tokenizer, tmp_path, config)
    policy.transformer.h = torch.nn.ModuleList()
    with pytest.raises(UserError, match="compile_policy = true: gpt2 has no blocks"):
        preflight(policy, tokenizer, tmp_path, config)


def test_what_cannot_be_saved_is_found(loaded, tmp_path, monkeypatch):
    """A generation config that is refused, a folder that is a file, a disk that is full."""
    policy, tokenizer = loaded
    policy.generation_config.temperature = 0.6
    with pytest.raises(UserError, match="the policy could not be saved here .*repair the model's files") as error:
        check_saving(policy, tokenizer, tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    policy.generation_config.temperature = None
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: the policy could not be saved here .*use another folder"):
        check_saving(policy, tokenizer, tmp_path / "file")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(UserError, match="No space left on device.; free disk space$"):
        check_saving(policy, tokenizer, tmp_path)


def test_a_tokenizer_that_comes_back_as_another_is_found(loaded, tmp_path, monkeypatch):
    """Here one whose saved file lacks the end of its merges."""
    policy, tokenizer = loaded
    save = type(tokenizer).save_pretrained

    def save_less(self, folder, **options):
        save(self, folder, **options)
        values = json.loads((folder / "tokenizer.json").read_text())
        values["model"]["merges"] = values["model"]["merges"][:20]
        (folder / "tokenizer.json").write_text(json.dumps(values))

    monkeypatch.setattr(type(tokenizer), "save_pretrained", save_less)
    with pytest.raises(UserError, match="the saved policy or tokenizer is not the one that was loaded"):
        check_saving(policy, tokenizer, tmp_path)


@pytest.fixture
def disk(monkeypatch):
    """Checkpoints of 1 GiB, and a disk whose free space the test sets."""
    found = SimpleNamespace(total=100 * GIB, free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: found)
    monkeypatch.setattr(module, "SPARE_BYTES", 0)
    # weights and two moments of 4 bytes each: 1 GiB
    parameter = SimpleNamespace(numel=lambda: GIB // 12 + 1, requires_grad=True)
    return found, SimpleNamespace(parameters=lambda: [parameter])


def test_room_is_needed_for_the_checkpoints_that_exist_at_a_time(disk, tiny_model_folder, tmp_path, capsys):
    found, policy = disk
    kept_2 = config_of(tiny_model_folder, n_grpo_steps=200, checkpoint_interval=50, keep_last=1, keep_best=True)
    found.free = 3.1 * GIB
    check_room(policy, tmp_path, kept_2)  # the newest, the best, the one being written
    found.free = 2.9 * GIB
    message = f"^{tmp_path}: 3 checkpoints need 3.0 GiB, but 2.9 GiB are free; free disk space, use another runs_dir"
    with pytest.raises(UserError, match=message):
        check_room(policy, tmp_path, kept_2)
    check_room(policy, tmp_path, kept_2.model_copy(update={"keep_best": False}))
    with pytest.raises(UserError, match="6 checkpoints need 6.0 GiB"):
        check_room(policy, tmp_path, kept_2.model_copy(update={"keep_last": 4, "checkpoint_interval": 10}))
    found.free = 1.1 * GIB
    check_room(policy, tmp_path, kept_2.model_copy(update={"n_grpo_steps": 50}))  # only one is ever saved
    for step in (50, 100):  # two that are there need no more room
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    check_room(policy, tmp_path, kept_2)
    found.free = 0.9 * GIB
    with pytest.raises(UserError, match="1 checkpoints need 1.0 GiB"):
        check_room(policy, tmp_path, kept_2)
    found.total = found.free = 0  # a file system that does not tell
    check_room(policy, tmp_path, kept_2)
    assert capsys.readouterr().out == ""


def test_room_for_a_number_of_steps_that_is_not_known_yet(disk, tiny_model_folder, tmp_path, capsys):
    """In SFT it follows from the data: one checkpoint must have room, and a lack for the others is said."""
    found, policy = disk
    unknown = config_of(tiny_model_folder, SFTConfig)
    found.free = 2.9 * GIB
    check_room(policy, tmp_path, unknown)
    assert f"warning: {tmp_path}: 3 checkpoints need 3.0 GiB, but 2.9 GiB are free" in capsys.readouterr().out
    with pytest.raises(UserError, match="3 checkpoints need 3.0 GiB"):
        check_room(policy, tmp_path, config_of(tiny_model_folder, SFTConfig, max_steps=1000))
    found.free = 0.9 * GIB
    with pytest.raises(UserError, match="3 checkpoints need 3.0 GiB"):
        check_room(policy, tmp_path, unknown)


def test_the_size_of_a_checkpoint_is_that_of_the_weights_and_two_moments(
    tiny_model, tiny_model_folder, tmp_path, monkeypatch
):
    """Tied weights count once, as they are saved once."""
    num_parameters = 512 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64) + 64
    config = config_of(tiny_model_folder, n_grpo_steps=1)
    for free, fits in ((12 * num_parameters + SPARE_BYTES, True), (12 * num_parameters + SPARE_BYTES - 1, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda folder, free=free: SimpleNamespace(total=1, free=free))
        if fits:
            check_room(tiny_model, tmp_path, config)
        else:
            with pytest.raises(UserError, match="1 checkpoints need 0.1 GiB, but 0.1 GiB are free"):
                check_room(tiny_model, tmp_path, config)
