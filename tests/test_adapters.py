"""The adapters, called as the official test suite of Assignment 5 calls them."""

import hashlib
import inspect

import adapters
import pytest
import torch

OFFICIAL_NAMES = {
    "run_tokenize_prompt_and_output",
    "run_compute_entropy",
    "run_get_response_log_probs",
    "run_masked_normalize",
    "run_sft_microbatch_train_step",
    "run_compute_group_normalized_rewards",
    "run_compute_naive_policy_gradient_loss",
    "run_compute_grpo_clip_loss",
    "run_compute_policy_gradient_loss",
    "run_masked_mean",
    "run_grpo_microbatch_train_step",
    "get_packed_sft_dataset",
    "run_iterate_batches",
    "run_parse_mmlu_response",
    "run_parse_gsm8k_response",
    "run_compute_per_instance_dpo_loss",
}


def seeded(make):
    torch.manual_seed(42)
    return make()


LOG_PROBS = seeded(lambda: torch.randn(2, 10))
MASK = seeded(lambda: torch.rand(2, 10)) > 0.5
ADVANTAGES = seeded(lambda: torch.randn(2, 1))
OLD_LOG_PROBS = LOG_PROBS + seeded(lambda: torch.randn(2, 10))


def test_every_official_name_is_a_short_call():
    for name in OFFICIAL_NAMES:
        assert callable(getattr(adapters, name))
    functions = {name for name, value in vars(adapters).items() if inspect.isfunction(value)}
    assert functions == OFFICIAL_NAMES


def test_sft_adapters():
    logits = seeded(lambda: torch.randn(2, 10, 100))
    entropy = adapters.run_compute_entropy(logits)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5, rtol=0)
    normalized = adapters.run_masked_normalize(tensor=LOG_PROBS, mask=MASK, dim=1, normalize_constant=42.0)
    torch.testing.assert_close(normalized, (LOG_PROBS * MASK).sum(1) / 42.0, atol=1e-6, rtol=0)
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss, _ = adapters.run_sft_microbatch_train_step(
        policy_log_probs=log_probs, response_mask=MASK, gradient_accumulation_steps=2, normalize_constant=1.0
    )
    torch.testing.assert_close(loss, -(LOG_PROBS * MASK).sum() / 4, atol=1e-6, rtol=0)
    torch.testing.assert_close(log_probs.grad, -MASK.float() / 4, atol=1e-6, rtol=0)


def test_tokenize_and_score(tiny_model, tokenizer):
    batch = adapters.run_tokenize_prompt_and_output(
        prompt_strs=["Hello, world!", "1 + 1"], output_strs=["Hello", " = 2"], tokenizer=tokenizer
    )
    assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "response_mask"), batch["labels"].shape
    )
    scores = adapters.run_get_response_log_probs(
        model=tiny_model, input_ids=batch["input_ids"], labels=batch["labels"], return_token_entropy=True
    )
    assert scores["log_probs"].shape == scores["token_entropy"].shape == batch["labels"].shape


def hashed_reward(response, ground_truth):
    reward = int.from_bytes(hashlib.sha256(response.encode()).digest()) % 10 / 10
    return {"reward": reward, "format_reward": reward, "answer_reward": reward}


@pytest.mark.parametrize("normalize_by_std", [True, False])
def test_group_normalized_rewards(normalize_by_std):
    responses = [f"hmm I think ths answer is {i}" for i in range(8)]
    advantages, raw, _ = adapters.run_compute_group_normalized_rewards(
        reward_fn=hashed_reward,
        rollout_responses=responses,
        repeated_ground_truths=["42"] * 8,
        group_size=4,
        advantage_eps=1e-6,
        normalize_by_std=normalize_by_std,
    )
    groups = torch.tensor([hashed_reward(response, "42")["reward"] for response in responses]).view(2, 4)
    expected = groups - groups.mean(1, keepdim=True)
    if normalize_by_std:
        expected = expected / (groups.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(advantages, expected.flatten(), atol=1e-6, rtol=0)
    torch.testing.assert_close(raw, groups.flatten())


def test_policy_gradient_adapters():
    naive = adapters.run_compute_naive_policy_gradient_loss(
        raw_rewards_or_advantages=ADVANTAGES, policy_log_probs=LOG_PROBS
    )
    torch.testing.assert_close(naive, -ADVANTAGES * LOG_PROBS)
    clipped, _ = adapters.run_compute_grpo_clip_loss(
        advantages=ADVANTAGES, policy_log_probs=LOG_PROBS, old_log_probs=OLD_LOG_PROBS, cliprange=0.1
    )
    ratio = (LOG_PROBS - OLD_LOG_PROBS).exp()
    expected = -torch.minimum(ratio * ADVANTAGES, ratio.clamp(0.9, 1.1) * ADVANTAGES)
    torch.testing.assert_close(clipped, expected)
    chosen, _ = adapters.run_compute_policy_gradient_loss(
        policy_log_probs=LOG_PROBS,
        loss_type="grpo_clip",
        raw_rewards=ADVANTAGES,
        advantages=ADVANTAGES,
        old_log_probs=OLD_LOG_PROBS,
        cliprange=0.1,
    )
    torch.testing.assert_close(chosen, expected)
    mean = adapters.run_masked_mean(tensor=LOG_PROBS, mask=MASK, dim=1)
    torch.testing.assert_close(mean, (LOG_PROBS * MASK).sum(1) / MASK.sum(1), atol=1e-6, rtol=0)
    loss, _ = adapters.run_grpo_microbatch_train_step(
        policy_log_probs=LOG_PROBS.clone().requires_grad_(),
        response_mask=MASK,
        gradient_accumulation_steps=2,
        loss_type="grpo_clip",
        raw_rewards=ADVANTAGES,
        advantages=ADVANTAGES,
        old_log_probs=OLD_LOG_PROBS,
        cliprange=0.1,
    )
    torch.testing.assert_close(loss, ((expected * MASK).sum(1) / MASK.sum(1)).mean() / 2, atol=1e-6, rtol=0)
