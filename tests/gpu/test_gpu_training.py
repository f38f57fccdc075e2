"""Optimizer steps on a GPU: memory, precision, adapters, compiled blocks. No case needs an engine."""

import gc
import math
from functools import partial

import pytest
import torch
from small_qwen import (
    DEVICE,
    GPU_CHECK,
    ON_GPU,
    compare,
    each_variant,
    load,
    load_as_a_run,
    make_batch,
    make_examples,
    make_rows,
    norm,
    only_on_gpu,
    score_row_by_row,
    settings_of_step,
    take_rows,
    with_adapters,
)

import GRPO_train
import SFT_train
from GRPO_helper import grpo_microbatch_train_step
from plainrl.checkpoint import load_optimizer_files, optimizer_tensors
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.devices import can_compile
from plainrl.log_probs import get_masked_response_log_probs
from plainrl.lora import adapted_layers, merged_state_dict
from plainrl.memory import estimate_training_memory
from plainrl.policy import compile_blocks, compute_clipped_gradient, prepare_training, score_responses
from plainrl.precision import add_working_copy, working_copy
from plainrl.prefix_tree import share_prefixes
from plainrl.records import Response, Rollout, TokenizedExample

pytestmark = GPU_CHECK
GIB = 2**30


def take_sft_step(policy, optimizer, batch, config):
    """One step of SFT_train.py on a batch; return its metrics."""
    accumulate = partial(SFT_train.accumulate_gradients, policy, batch, 0, config)
    metrics, grad_norm, _ = compute_clipped_gradient(policy, accumulate, config)
    assert math.isfinite(grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each_variant
def test_sft_steps_lower_the_loss(qwen_folder, variant, dtype, record_property):
    """Three steps on the same batch, with checkpointing. In float16 the loss is scaled."""
    settings = {"compute_dtype": dtype, "loss_scale": 256.0, "gradient_checkpointing": True}
    policy, config = load_as_a_run(qwen_folder, **settings | variant, normalize_constant=100.0)
    optimizer = prepare_training(policy, config)
    steps = [take_sft_step(policy, optimizer, make_examples(), config) for _ in range(3)]
    losses = [metrics["train/loss_per_token"] for metrics in steps]
    record_property("losses", losses)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1


@each_variant
def test_a_resumed_optimizer_takes_the_same_step(qwen_folder, tmp_path, variant):
    """Fused AdamW keeps its step count on the GPU. Saved and loaded, it takes the same step bit for bit."""
    from safetensors.torch import save_file

    def policy_and_optimizer():
        policy, config = load_as_a_run(qwen_folder, **variant)
        return policy, prepare_training(policy, config)

    def step(policy, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        optimizer.step()

    first, optimizer = policy_and_optimizer()
    step(first, optimizer, 1)
    save_file(optimizer_tensors(first, optimizer), tmp_path / "optimizer.safetensors")
    second, resumed = policy_and_optimizer()
    second.load_state_dict(first.state_dict())
    load_optimizer_files([tmp_path / "optimizer.safetensors"], second, resumed)
    before = [parameter.detach().clone() for parameter in first.parameters()]
    step(first, optimizer, 2)
    step(second, resumed, 2)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert any(not torch.equal(one, other) for one, other in zip(before, first.parameters(), strict=True))


def make_rollouts(policy, with_old_log_probs):
    """Rollouts whose log-probs are the policy's own, as those of an engine in step with it. One has no advantage."""
    responses = [
        Response(prompt, "", answer, [0.0] * len(answer), "stop") for prompt, answer in zip(*make_rows(), strict=True)
    ]
    scores = score_responses(policy, responses, 0, 4)
    rollouts = []
    for index, (response, score) in enumerate(zip(responses, scores, strict=True)):
        response = response._replace(log_probs=score["log_probs"].tolist())
        old = score["log_probs"] if with_old_log_probs else None
        rollouts.append(Rollout(None, response, {"reward": float(index % 2)}, 1.0 - 2 * (index % 2), None, old))
    rollouts[2].advantage = 0.0
    return rollouts


@pytest.mark.parametrize("loss_type", ["reinforce_with_baseline", "grpo_clip"])
def test_a_grpo_update_moves_the_policy_and_checks_the_sync(qwen_folder, policy, loss_type, record_property):
    """update_policy, called as a run calls it. Its log-probs differ from those of the rollouts by rounding only."""
    is_off_policy = loss_type == "grpo_clip"
    settings = {
        "loss_type": loss_type,
        "rollout_batch_size": 6,
        "group_size": 3,
        "epochs_per_rollout_batch": 2 if is_off_policy else 1,
        "learning_rate": 1e-4,
        "max_sync_error": 1.05,
        "sampling_min_tokens": 0,
    }
    config = GRPOConfig(**settings_of_step(qwen_folder, **settings))
    optimizer = prepare_training(policy, config)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    rows = GRPO_train.update_policy(policy, optimizer, make_rollouts(policy, is_off_policy), 0, 1, config)
    record_property("metrics", rows)
    assert len(rows) == 1 + is_off_policy
    assert rows[0]["rollout/log_prob_gap_multiplicative"] < 1.05
    for row in rows:
        assert math.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0 and row["train/num_trained_rows"] == 5
    if is_off_policy:
        assert abs(rows[0]["train/ratio_mean"] - 1) < 0.02 and rows[1]["train/ratio_max"] > 1
    assert any(not torch.equal(one, other) for one, other in zip(before, policy.parameters(), strict=True))


# --- 16-bit weights beside float32 masters (plainrl/precision.py): their own cases stand here ------------------------


# --- adapters, memory, compiled blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_adapters_have_the_scores_and_gradients_of_the_merged_model(qwen_folder, dtype, record_property):
    """In float64 row by row: W' = W + 2 B A in the plain model, and dA = 2 B^T dW', dB = 2 dW' A^T."""
    policy = with_adapters(load(qwen_folder, "cpu"), dtype)
    policy.gradient_checkpointing_enable()
    policy.train()
    batch = make_batch()
    found = get_masked_response_log_probs(policy, **take_rows(batch, list(range(6))))["log_probs"]
    found.sum().backward()
    plain = load(qwen_folder, "cpu", torch.float64, sharing=False)
    plain.load_state_dict({name: tensor.cpu() for name, tensor in merged_state_dict(policy)})
    expected = score_row_by_row(plain, batch)
    expected.sum().backward()
    of_weights = {name.removesuffix(".weight"): part.grad for name, part in plain.named_parameters()}
    found_gradients, gradients = [], []
    for name, layer in adapted_layers(policy).items():
        a, b = layer.lora_a.detach().double().cpu(), layer.lora_b.detach().double().cpu()
        gradients += [2 * b.T @ of_weights[name], 2 * of_weights[name] @ a.T]
        found_gradients += [layer.lora_a.grad, layer.lora_b.grad]
    compare((found, found_gradients), (expected, gradients), dtype, record_property)


@only_on_gpu
def test_a_microbatch_leaves_no_memory_behind(policy):
    """Ten times the same microbatch has the same peak each time. Only the gradients stay."""
    model = working_copy(policy).train()
    batch = take_rows(make_batch(), list(range(6)))
    peaks, kept = [], []
    for _ in range(10):
        torch.cuda.reset_peak_memory_stats(DEVICE)
        scores = get_masked_response_log_probs(model, **batch, return_token_entropy=True)
        advantages = torch.ones(6, 1, device=DEVICE)
        grpo_microbatch_train_step(
            scores["log_probs"], batch["response_mask"], 1, "reinforce_with_baseline", advantages=advantages
        )
        del scores
        kept.append(torch.cuda.memory_allocated(DEVICE))
        peaks.append(torch.cuda.max_memory_allocated(DEVICE))
    assert len(set(kept[1:])) == 1 and len(set(peaks[1:])) == 1, (kept, peaks)


@only_on_gpu
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_the_memory_estimate_is_near_the_peak(checkpointing, record_property):
    """A step on 8 rows of 1,024 tokens that share nothing. The estimate may be 10 % too low, or a half too high.

    The model is larger than that of the other cases. A chunk of its logits is one block of them, as the estimate says.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 8}
    shape = {"vocab_size": 2**15, "hidden_size": 1024, "intermediate_size": 4096, "tie_word_embeddings": True}
    model_config = Qwen2Config(**shape, **heads)
    settings = {"train_batch_size": 8, "microbatch_tokens": 8192, "max_context_tokens": 1024, "sampling_max_tokens": 9}
    config = SFTConfig(**settings_of_step("", **settings, gradient_checkpointing=checkpointing))
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(5, 2**15, (8, 1024), generator=generator).tolist()
    batch = [TokenizedExample(None, row[:256], row[256:]) for row in tokens]
    gc.collect()
    before = torch.cuda.memory_allocated(DEVICE)
    with torch.device(DEVICE):
        policy = Qwen2ForCausalLM(model_config)
    assert share_prefixes(policy)
    add_working_copy(policy, config.compute_dtype)
    optimizer = prepare_training(policy, config)
    take_sft_step(policy, optimizer, batch, config)  # from here on there are moments
    torch.cuda.reset_peak_memory_stats(DEVICE)
    take_sft_step(policy, optimizer, batch, config)
    measured = (torch.cuda.max_memory_allocated(DEVICE) - before) / GIB
    estimate = sum(estimate_training_memory(model_config, config).values())
    record_property("peak_gib", measured)
    record_property("estimated_gib", estimate)
    assert 0.9 * measured < estimate < 1.5 * measured


@pytest.mark.skipif(not ON_GPU, reason="tests/test_prefix_tree.py does this on a CPU")
def test_compiled_blocks_compute_the_same(qwen_folder, record_property):
    """compile_policy, on trees of several sizes: the same scores and gradients as without it, but for rounding."""
    if not can_compile(DEVICE):
        pytest.skip("needs a compiler and Python's headers")
    from torch._dynamo.utils import counters

    counters.clear()
    batch, scores, gradients = make_batch(), [], []
    for is_compiled in (False, True):
        policy = load(qwen_folder, compute_dtype="bfloat16")
        model = working_copy(policy).train()
        if is_compiled:
            compile_blocks(model)
        found = []
        for part in ([0, 1, 2, 3, 4, 5], [5], [3, 4], [0, 1, 2], [0, 4]):
            result = get_masked_response_log_probs(model, **take_rows(batch, part))["log_probs"]
            result.sum().backward()
            found.append(result.detach().flatten())
        scores.append(torch.cat(found))
        gradients.append([parameter.grad for parameter in policy.parameters()])
    difference = norm(one - other for one, other in zip(*gradients, strict=True))
    record_property("score_difference_max", float((scores[0] - scores[1]).abs().max()))
    record_property("gradient_difference", difference / norm(gradients[0]))
    record_property("counters", {name: dict(counters[name]) for name in ("stats", "recompiles")})
    assert counters["stats"]["unique_graphs"] > 0
    assert (scores[0] - scores[1]).abs().max() < 0.15 and difference < 0.05 * norm(gradients[0])
