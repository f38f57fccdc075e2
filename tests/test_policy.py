"""The policy: what cannot be loaded is refused, attention is chosen, scores do not depend on batching."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import BloomConfig, GPT2Config, GPT2LMHeadModel, Qwen2Config

from plainrl.config import RunConfig, SFTConfig
from plainrl.policy import (
    blocks_of,
    choose_attention,
    load_policy,
    prepare_training,
    require_context,
    score_responses,
)
from plainrl.records import Response, UserError

SHORT = {"max_context_tokens": 256, "sampling_max_tokens": 8}


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


@pytest.mark.parametrize("is_by_kind", [False, True])
def test_rows_that_would_change_the_embeddings_of_others_are_refused(is_by_kind):
    """LongRoPE has other angles beyond the original context, for all rows of a forward pass."""
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    rope = {"full_attention": rope} if is_by_kind else rope
    policy = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=131072, rope_parameters=rope))
    require_context(policy, RunConfig(max_context_tokens=4096))
    with pytest.raises(UserError, match="max_context_tokens = 4097: beyond 4096 tokens .* has other rotary embeddings"):
        require_context(policy, RunConfig(max_context_tokens=4097))


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


def test_what_takes_long_on_a_gpu_is_said_before_it_begins(tiny_model_folder, monkeypatch, capsys):
    """Moving the weights and compiling are replaced. On the CPU, loading says nothing."""
    monkeypatch.setattr("transformers.PreTrainedModel.to", lambda model, device: model)
    monkeypatch.setattr("plainrl.policy.compile_blocks", lambda model: None)
    settings = {"model": tiny_model_folder, "compute_dtype": "float32", **SHORT}
    on_gpu = SFTConfig(policy_device="cuda:0", compile_policy=True, **settings)
    load_policy(SFTConfig(**settings))
    assert capsys.readouterr().out == ""
    policy, _ = load_policy(on_gpu, for_training=False)  # so that no card is asked for its memory
    assert capsys.readouterr().out == f"loading the policy onto cuda:0: {tiny_model_folder}\n"
    prepare_training(policy, on_gpu.model_copy(update={"compile_policy": False}))
    assert capsys.readouterr().out == ""
    prepare_training(policy, on_gpu)
    assert capsys.readouterr().out.startswith("compile_policy = true: the first step compiles, which takes")


def test_a_policy_without_blocks_is_not_compiled():
    """GPT-2's blocks have another name than Llama's."""
    policy = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=64))
    assert [type(block).__name__ for block in blocks_of(policy)] == ["GPT2Block"] * 3
    policy.transformer.h = torch.nn.ModuleList()
    with pytest.raises(UserError, match="^compile_policy = true: gpt2 has no blocks to compile; leave it out$"):
        blocks_of(policy)


def step_with_decay(policy, optimizer):
    """One step along a gradient of ones."""
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_weight_decay_leaves_norms_and_biases_alone():
    """GPT-2 has both. AdamW's first step moves each number by the learning rate; decay shrinks it before that."""
    policy = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(0.5)
    step_with_decay(policy, prepare_training(policy, SFTConfig(weight_decay=0.1, learning_rate=0.01)))
    seen = set()
    for name, parameter in policy.named_parameters():
        is_decayed = name.endswith("weight") and "ln_" not in name
        expected = 0.5 * (1 - 0.01 * 0.1 * is_decayed) - 0.01
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected), atol=1e-7, rtol=0)
        seen.add((is_decayed, name.rpartition(".")[2]))
    assert seen == {(True, "weight"), (False, "weight"), (False, "bias")}


def test_without_weight_decay_the_groups_change_nothing(tiny_model_folder):
    """Bit for bit the step of one AdamW over all parameters."""
    policies = [load_policy(RunConfig(model=tiny_model_folder, **SHORT))[0] for _ in range(2)]
    plain = torch.optim.AdamW(policies[1].parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizers = [prepare_training(policies[0], SFTConfig(learning_rate=1e-3)), plain]
    for _ in range(3):
        for policy, optimizer in zip(policies, optimizers, strict=True):
            generator = torch.Generator().manual_seed(1)
            for parameter in policy.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for one, other in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        assert torch.equal(one, other)
