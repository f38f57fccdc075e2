"""The GRPO mathematics against constants worked by hand and losses written as loops in float64.

What holds for every loss and every length normalization is in test_losses.py.
"""

import math
import re

import pytest
import torch

from GRPO_helper import (
    LENGTH_NORMALIZATIONS,
    Loss,
    StepSize,
    compute_group_normalized_rewards,
    compute_grpo_clip_loss,
    compute_naive_policy_gradient_loss,
    compute_policy_gradient_loss,
    grpo_clip,
    grpo_microbatch_train_step,
    masked_mean,
    mean_per_response,
    mean_per_token,
    normalize_within_groups,
    sum_over_longest,
)

LOSS_TYPES = ["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip", "cispo"]


def rewards_of(values):
    """A reward function that reads the reward from the response."""
    return lambda response, truth: {"reward": float(response)}, [str(value) for value in values], ["x"] * len(values)


def test_advantages_by_hand():
    reward_fn, responses, truths = rewards_of([1, 0, 0, 1, 1, 1, 0, 1])
    advantages, raw, metadata = compute_group_normalized_rewards(reward_fn, responses, truths, 4, 1e-6, True)
    # group 1: mean 0.5, sample std sqrt(1/3); group 2: mean 0.75, sample std 0.5
    a, b, c = 0.5 / (math.sqrt(1 / 3) + 1e-6), 0.25 / (0.5 + 1e-6), -0.75 / (0.5 + 1e-6)
    assert advantages.tolist() == pytest.approx([a, -a, -a, a, b, b, c, b], abs=1e-6)
    assert raw.tolist() == [1, 0, 0, 1, 1, 1, 0, 1]
    assert metadata["reward_mean"] == pytest.approx(0.625)
    assert (metadata["reward_min"], metadata["reward_max"]) == (0, 1)
    assert metadata["reward_std"] == pytest.approx(math.sqrt(15 / 56))  # 5 of 8 are right; sample std
    advantages, _, _ = compute_group_normalized_rewards(reward_fn, responses, truths, 4, 1e-6, False)
    assert advantages.tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5, 0.25, 0.25, -0.75, 0.25], abs=1e-7)


@pytest.mark.parametrize("normalize_by_std", [True, False])
def test_groups_of_equal_rewards_have_advantage_exactly_zero(normalize_by_std):
    reward_fn, responses, truths = rewards_of([0.1] * 3 + [0.0, 1.0, 0.0])
    advantages, _, metadata = compute_group_normalized_rewards(reward_fn, responses, truths, 3, 1e-6, normalize_by_std)
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert (advantages[3:] != 0).all()
    assert metadata["zero_advantage_fraction"] == 0.5


@pytest.mark.parametrize("normalize_by_std", [True, False])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 0, math.nan, 1], "reward 2 of 4 is nan"),
        ([math.inf, 0, 1, 1], "reward 0 of 4 is inf"),
        ([0, 1, 1, -math.inf], "reward 3 of 4 is -inf"),
        ([0, 1e300, 1, 0], "reward 1 of 4 is inf"),  # float32 ends at 3.4e38
        ([math.nan, math.nan, 1, math.inf], "reward 0 of 4 is nan"),  # the first is named
    ],
)
def test_rewards_that_are_no_finite_numbers_are_refused_with_their_index(values, message, normalize_by_std):
    reward_fn, responses, truths = rewards_of(values)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}: give finite rewards"):
        compute_group_normalized_rewards(reward_fn, responses, truths, 2, 1e-6, normalize_by_std)
    with pytest.raises(ValueError, match=re.escape(message)):
        normalize_within_groups(torch.tensor(values), 2, 1e-6, normalize_by_std)


def test_rewards_whose_sum_overflows_are_refused():
    """Finite each, but the mean of the group is 6e38 / 2, and 6e38 is infinite in float32."""
    with pytest.raises(ValueError, match="^advantage 2 of 4 is -inf: give finite rewards below 1e18"):
        normalize_within_groups(torch.tensor([1.0, 0.0, 3e38, 3.1e38]), 2, 1e-6, normalize_by_std=False)


def test_integer_and_truth_value_rewards_are_numbers():
    responses, truths = ["a", "b", "c", "d"], ["x"] * 4
    rewards = dict(zip(responses, (1, 0, True, False), strict=True))
    advantages, raw, _ = compute_group_normalized_rewards(
        lambda response, truth: {"reward": rewards[response]}, responses, truths, 2, 1e-6, False
    )
    assert raw.tolist() == [1, 0, 1, 0] and advantages.tolist() == [0.5, -0.5, 0.5, -0.5]


def test_advantages_refuse_bad_input():
    reward_fn, responses, truths = rewards_of([1, 0, 1])
    with pytest.raises(ValueError, match="3 responses do not make whole groups of group_size = 2"):
        compute_group_normalized_rewards(reward_fn, responses, truths, 2, 1e-6, True)
    with pytest.raises(ValueError, match="3 responses and 2"):
        compute_group_normalized_rewards(reward_fn, responses, truths[:2], 3, 1e-6, True)
    with pytest.raises(ValueError, match="group_size = 1"):
        compute_group_normalized_rewards(reward_fn, responses, truths, 1, 1e-6, True)


def random_batch(seed=0, rows=4, tokens=6):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -draw(rows, tokens).abs()
    mask = torch.rand(rows, tokens, generator=generator) > 0.3
    mask[:, 0] = True
    return {
        "policy_log_probs": old + 0.3 * draw(rows, tokens),
        "response_mask": mask,
        "raw_rewards": draw(rows, 1).sign().clamp(min=0),
        "advantages": draw(rows, 1),
        "old_log_probs": old,
        "cliprange": 0.2,
        "ratio_cap": 1.1,
    }


def naive_token_loss(loss_type, batch, row, token):
    log_prob = batch["policy_log_probs"][row, token].item()
    ratio = math.exp(log_prob - batch["old_log_probs"][row, token].item())
    advantage, reward = batch["advantages"][row, 0].item(), batch["raw_rewards"][row, 0].item()
    clipped = min(max(ratio, 0.8), 1.2)
    return {
        "no_baseline": -reward * log_prob,
        "reinforce_with_baseline": -advantage * log_prob,
        "grpo_clip": -min(ratio * advantage, clipped * advantage),
        "grpo_no_clip": -ratio * advantage,
        "cispo": -min(ratio, 1.1) * advantage * log_prob,
    }[loss_type]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_equal_a_naive_loop(loss_type):
    batch = random_batch()
    mask = batch["response_mask"]
    expected_rows = [
        [naive_token_loss(loss_type, batch, row, token) for token in range(6) if mask[row, token]] for row in range(4)
    ]
    expected = sum(sum(losses) / len(losses) for losses in expected_rows) / 4 / 2
    batch["policy_log_probs"].requires_grad_()
    loss, _ = grpo_microbatch_train_step(**batch, gradient_accumulation_steps=2, loss_type=loss_type)
    assert loss.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "has_gradient", "side"),
    [
        (1.5, 1.0, -1.2, False, "high"),
        (0.5, 1.0, -0.5, True, None),
        (1.5, -1.0, 1.5, True, None),
        (0.5, -1.0, 0.8, False, "low"),
        (1.1, 1.0, -1.1, True, None),
        (0.9, -1.0, 0.9, True, None),
    ],
)
def test_clip_cases(ratio, advantage, loss, has_gradient, side):
    log_probs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    per_token, metadata = compute_grpo_clip_loss(
        torch.tensor([[advantage]], dtype=torch.float64), log_probs, torch.zeros(1, 1, dtype=torch.float64), 0.2
    )
    per_token.sum().backward()
    assert per_token.item() == pytest.approx(loss, abs=1e-12)
    assert (log_probs.grad.item() != 0) == has_gradient
    assert metadata["clip_fraction_low"].item() == (side == "low")
    assert metadata["clip_fraction_high"].item() == (side == "high")


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "has_gradient"),
    [
        (1.25, 1.0, -1.25, True),  # beyond eps, within eps_high
        (1.5, 1.0, -1.3, False),
        (0.5, -1.0, 0.8, False),  # eps_high leaves the low side alone
        (2.9, -1.0, 2.9, True),
        (3.5, -1.0, 3.0, False),  # c = 3
        (3.5, 1.0, -1.3, False),
    ],
)
def test_clip_higher_and_dual_clip_cases(ratio, advantage, loss, has_gradient):
    log_probs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    per_token, metadata = compute_policy_gradient_loss(
        *(log_probs, "grpo_clip", None, torch.tensor([[advantage]], dtype=torch.float64), torch.zeros_like(log_probs)),
        *(0.2,),
        cliprange_high=0.3,
        cliprange_dual=3.0,
    )
    per_token.sum().backward()
    assert per_token.item() == pytest.approx(loss, abs=1e-12)
    assert (log_probs.grad.item() != 0) == has_gradient
    assert metadata["clip_fraction_dual"].item() == (ratio == 3.5 and advantage < 0)


def test_scales_of_advantages_by_hand():
    """Rewards 1, 0, 0, 0 and 1, 1, 1, 0: means 1/4 and 3/4; of all eight the mean is 1/2, the sample std sqrt(2/7)."""
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0])
    centered = [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75]
    scales = {False: [1.0] * 8, True: [0.5] * 8, "batch": [math.sqrt(2 / 7)] * 8, "mean": [0.25] * 4 + [0.75] * 4}
    for scale, divisors in scales.items():
        expected = [value / divisor for value, divisor in zip(centered, divisors, strict=True)]
        found = normalize_within_groups(rewards, 4, 1e-12, scale)
        assert found.tolist() == pytest.approx(expected, rel=1e-6), scale
        zero = normalize_within_groups(torch.tensor([0.0] * 4 + [1, 0, 0, 0]), 4, 1e-12, scale)
        assert zero[:4].tolist() == [0] * 4 and zero.isfinite().all(), scale


def test_missing_arguments_are_named():
    log_probs = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="no_baseline needs raw_rewards"):
        compute_policy_gradient_loss(log_probs, "no_baseline")
    with pytest.raises(ValueError, match="grpo_clip needs advantages and old_log_probs and cliprange"):
        compute_policy_gradient_loss(log_probs, "grpo_clip")
    with pytest.raises(ValueError, match="grpo_no_clip needs old_log_probs"):
        compute_policy_gradient_loss(log_probs, "grpo_no_clip", advantages=torch.ones(1, 1))
    with pytest.raises(ValueError, match="cispo needs old_log_probs and ratio_cap"):
        compute_policy_gradient_loss(log_probs, "cispo", advantages=torch.ones(1, 1))
    with pytest.raises(ValueError, match="loss_type = 'ppo': use one of no_baseline, "):
        compute_policy_gradient_loss(log_probs, "ppo")


def test_masked_mean_by_hand():
    tensor, mask = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[1, 0, 1], [0, 0, 1]])
    assert masked_mean(tensor, mask).item() == pytest.approx(10 / 3, abs=1e-6)
    assert masked_mean(tensor, mask, dim=-1).tolist() == [2.0, 6.0]
    by_column = masked_mean(tensor, mask, dim=0)
    assert by_column[0] == 1.0 and math.isnan(by_column[1]) and by_column[2] == 4.5
    with pytest.raises(ValueError, match="same shape"):
        masked_mean(tensor, mask[0])


def test_metadata_is_of_response_tokens_only():
    log_probs = torch.log(torch.tensor([[1.5, 0.5, 9.0]])).requires_grad_()
    mask = torch.tensor([[True, True, False]])
    _, metadata = grpo_microbatch_train_step(
        log_probs, mask, 1, "grpo_clip", advantages=torch.ones(1, 1), old_log_probs=torch.zeros(1, 3), cliprange=0.2
    )
    assert metadata["num_tokens"].item() == 2
    assert metadata["clip_fraction_high"].item() == 0.5
    assert metadata["clip_fraction_low"].item() == 0
    assert metadata["ratio_max"].item() == pytest.approx(1.5)
    assert metadata["ratio_mean"].item() == pytest.approx(1.0)


def test_length_normalizations_by_hand():
    losses = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    size = StepSize(num_rows=2, num_tokens=3, max_response_tokens=10)
    assert mean_per_response(losses, mask, size).item() == pytest.approx((1.5 + 4.0) / 2)
    assert sum_over_longest(losses, mask, size).item() == pytest.approx((3.0 + 4.0) / 20)
    assert mean_per_token(losses, mask, size).item() == pytest.approx(7.0 / 3)
    functions = {"masked_mean": mean_per_response, "masked_normalize": sum_over_longest, "token_mean": mean_per_token}
    assert functions.items() <= LENGTH_NORMALIZATIONS.items()


def test_a_microbatch_weighs_every_response_the_same():
    """The step of the assignment divides by B S, whatever the lengths: the mean of the rows' means."""
    log_probs = torch.tensor([[-1.0, -3.0, -5.0], [-2.0, 0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss, metadata = grpo_microbatch_train_step(
        log_probs, mask, 2, "reinforce_with_baseline", advantages=torch.tensor([[1.0], [-2.0]])
    )
    assert loss.item() == pytest.approx((3.0 - 4.0) / 4)
    assert not loss.requires_grad
    assert log_probs.grad.tolist() == [pytest.approx([-1 / 12] * 3), [0.5, 0.0, 0.0]]
    assert metadata["num_tokens"].item() == 4
    with pytest.raises(ValueError, match="gradient_accumulation_steps = 0: must be at least 1"):
        grpo_microbatch_train_step(log_probs, mask, 0, "reinforce_with_baseline", advantages=torch.ones(2, 1))


def test_naive_loss_by_hand():
    advantages, log_probs = torch.tensor([[2.0], [-1.0]]), torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    assert compute_naive_policy_gradient_loss(advantages, log_probs).tolist() == [[2.0, 4.0], [-3.0, -4.0]]


def test_helpers_leave_their_inputs_alone():
    """Those of rewards and of masks, called on what they are given itself; the losses are in test_losses.py."""
    tensor, mask, rewards = torch.randn(2, 3), torch.tensor([[1, 0, 1], [0, 0, 1]]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    saved = [value.clone() for value in (tensor, mask, rewards)]
    masked_mean(tensor, mask, dim=-1)
    for normalize_by_std in (True, False):
        normalize_within_groups(rewards, 2, 1e-6, normalize_by_std)
    assert all(torch.equal(a, b) for a, b in zip(saved, (tensor, mask, rewards), strict=True))
    responses, truths = ["a", "b"], ["c", "d"]
    compute_group_normalized_rewards(lambda a, b: {"reward": 1.0}, responses, truths, 2, 1e-6, True)
    assert (responses, truths) == (["a", "b"], ["c", "d"])


def test_a_loss_needs_and_skips_what_there_is():
    with pytest.raises(ValueError, match="needs = kl: LossInputs has log_probs, mask, advantages"):
        Loss(grpo_clip, needs=("kl",))
    with pytest.raises(ValueError, match="options = kl: LossInputs has log_probs, mask, advantages"):
        Loss(grpo_clip, options=("kl",))
    with pytest.raises(ValueError, match="zero_with = cliprange: use advantages, raw_rewards or None"):
        Loss(grpo_clip, zero_with="cliprange")
