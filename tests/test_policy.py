"""The policy: what cannot be loaded is refused, attention is chosen, scores do not depend on batching."""

import json
import shutil

import pytest
import torch

from plainrl.config import RunConfig
from plainrl.policy import choose_attention, load_policy, score_responses
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


def test_incomplete_model_folders_are_refused(tiny_model_folder, tmp_path):
    for missing in ("model.safetensors", "tokenizer.json"):
        folder = tmp_path / missing
        shutil.copytree(tiny_model_folder, folder)
        (folder / missing).unlink()
        with pytest.raises(UserError, match="it needs config, weights and tokenizer"):
            load_policy(RunConfig(model=str(folder), max_context_tokens=256, sampling_max_tokens=8))


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
