"""The policy: what cannot be loaded is refused, attention is chosen, scores do not depend on batching."""

import json
import shutil

import pytest
import torch
from transformers import BloomConfig, GPT2Config, GPT2LMHeadModel, Qwen2Config

from plainrl.config import RunConfig
from plainrl.policy import blocks_of, choose_attention, load_policy, score_responses
from plainrl.records import Response, UserError


def test_scores_do_not_depend_on_batching(tiny_model):
    responses = [Response([5] * (3 + i), "", list(range(10, 12 + 2 * i)), [], "stop") for i in range(5)]
    together = score_responses(tiny_model, responses, padding_id=0, batch_size=5)
    apart = score_responses(tiny_model, responses, padding_id=0, batch_size=1)
    for a, b, response in zip(together, apart, responses, strict=True):
        assert a["log_probs"].shape == a["token_entropy"].shape == (len(response.token_ids),)
        torch.testing.assert_close(a["log_probs"], b["log_probs"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a["token_entropy"], b["token_entropy"], atol=1e-5, rtol=1e-5)


def test_scoring_leaves_the_policy_in_its_mode(tiny_model):
    tiny_model.train()
    score_responses(tiny_model, [Response([5], "", [6, 7], [], "stop")], padding_id=0, batch_size=1)
    assert tiny_model.training


def test_a_model_that_changes_its_logits_is_refused(tiny_model_folder, tmp_path):
    folder = tmp_path / "scaled"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logits_scaling": 8.0}))
    with pytest.raises(UserError, match=r"it changes its logits \(logits_scaling\)"):
        load_policy(RunConfig(model=str(folder), max_context_tokens=256, sampling_max_tokens=8))


def test_context_longer_than_the_models_is_refused(tiny_model_folder):
    with pytest.raises(UserError, match="max_context_tokens = 2048: .* has a context of 512 tokens"):
        load_policy(RunConfig(model=tiny_model_folder))


def test_attention_choice(monkeypatch):
    on_gpu = RunConfig(policy_device="cuda:0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_attention(on_gpu) == "sdpa"
    with pytest.raises(UserError, match="flash_attention_2 needs the package flash-attn"):
        choose_attention(on_gpu.model_copy(update={"attn_implementation": "flash_attention_2"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_attention(on_gpu) == "flash_attention_2"
    assert choose_attention(RunConfig(policy_device="cuda:0", compute_dtype="float32")) == "sdpa"
    assert choose_attention(RunConfig()) == "sdpa"
    needs = "needs a CUDA policy_device and compute_dtype = bfloat16 or float16; or use auto"
    with pytest.raises(UserError, match=needs):
        choose_attention(RunConfig(attn_implementation="flash_attention_2", compute_dtype="float32"))
    assert choose_attention(RunConfig(attn_implementation="eager")) == "eager"


def test_attention_is_one_that_the_model_has(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    on_gpu = RunConfig(policy_device="cuda:0")
    assert choose_attention(on_gpu, Qwen2Config()) == "flash_attention_2"
    assert choose_attention(on_gpu, BloomConfig()) == choose_attention(RunConfig(), BloomConfig()) == "eager"
    assert choose_attention(RunConfig(), Qwen2Config()) == "sdpa"
    assert choose_attention(RunConfig(attn_implementation="sdpa"), BloomConfig()) == "sdpa"  # its loading says more


def test_a_policy_is_ready_for_the_engines_changes_to_its_class(tiny_model_folder):
    """vLLM's decorator of a class of Transformers reads this attribute at each call."""
    policy, _ = load_policy(RunConfig(model=tiny_model_folder, max_context_tokens=256, sampling_max_tokens=8))
    assert policy.base_model.do_not_compile is True


def test_a_policy_without_blocks_is_not_compiled():
    """GPT-2's blocks have another name than Llama's."""
    policy = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=64))
    assert [type(block).__name__ for block in blocks_of(policy)] == ["GPT2Block"] * 3
    policy.transformer.h = torch.nn.ModuleList()
    with pytest.raises(UserError, match="^compile_policy = true: gpt2 has no blocks to compile; leave it out$"):
        blocks_of(policy)
