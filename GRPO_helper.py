"""The mathematics of GRPO: group-normalized advantages and policy-gradient losses.

Symbols: N responses in groups of G to the same question; R the reward, A the advantage; T positions; m the
response mask; rho_t = pi(y_t) / pi_old(y_t) the importance ratio of a token; eps the clip range.

    advantage     A_i = (R_i - mean of its group) [ / (std of its group + advantage_eps) ]
    loss types    no_baseline              -R log pi
                  reinforce_with_baseline  -A log pi
                  grpo_clip                -min(rho A, clip(rho, 1 - eps, 1 + eps) A)
                  grpo_no_clip             -rho A

Sources: Shao et al. 2024 (DeepSeekMath, GRPO), equations 3 and 4; Liu et al. 2025 (Dr. GRPO: no std);
Stanford CS336 (Spring 2025), Assignment 5, section 7.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from SFT_helper import masked_normalize

LENGTH_NORMALIZATIONS = ("masked_mean", "masked_normalize", "token_mean")
REQUIRED_ARGUMENTS: dict[str, tuple[str, ...]] = {  # of each loss type
    "no_baseline": ("raw_rewards",),
    "reinforce_with_baseline": ("advantages",),
    "grpo_clip": ("advantages", "old_log_probs", "cliprange"),
    "grpo_no_clip": ("advantages", "old_log_probs"),
}


def compute_group_normalized_rewards(
    reward_fn: Callable[[str, str], dict[str, float]],
    rollout_responses: list[str],
    repeated_ground_truths: list[str],
    group_size: int,
    advantage_eps: float,
    normalize_by_std: bool,
) -> tuple[Float[Tensor, " rollouts"], Float[Tensor, " rollouts"], dict[str, float]]:
    """Grade the responses, and normalize the rewards as `normalize_within_groups` does.

    Args: group_size, advantage_eps, normalize_by_std: as there.
        reward_fn: maps (response, ground truth) to a dictionary with `reward`.
        rollout_responses: N responses, those to the same question next to each other.
        repeated_ground_truths: N answers, each repeated `group_size` times.

    Returns:
        Advantages (N,), raw rewards (N,), both float32; and metadata: mean, std (sample), min and max of the
        rewards, and the fraction of responses whose advantage is zero.

    Raises:
        ValueError: lengths differ, or N is not a multiple of G.

    Source: CS336 Assignment 5, problem compute_group_normalized_rewards.
    """
    if len(rollout_responses) != len(repeated_ground_truths):
        raise ValueError(
            f"{len(rollout_responses)} responses and {len(repeated_ground_truths)} ground truths: give as many"
        )
    pairs = zip(rollout_responses, repeated_ground_truths, strict=True)
    raw_rewards = torch.tensor([float(reward_fn(response, truth)["reward"]) for response, truth in pairs])
    advantages = normalize_within_groups(raw_rewards, group_size, advantage_eps, normalize_by_std)
    metadata = {
        "reward_mean": raw_rewards.mean().item(),
        "reward_std": raw_rewards.std().item() if len(raw_rewards) > 1 else 0.0,
        "reward_min": raw_rewards.min().item(),
        "reward_max": raw_rewards.max().item(),
        "zero_advantage_fraction": (advantages == 0).float().mean().item(),
    }
    return advantages, raw_rewards, metadata


def normalize_within_groups(
    raw_rewards: Float[Tensor, " rollouts"], group_size: int, advantage_eps: float, normalize_by_std: bool
) -> Float[Tensor, " rollouts"]:
    """Subtract from each reward the mean of its group.

        A_i = R_i - mean(R_group),    divided by (std(R_group) + advantage_eps) if `normalize_by_std`

    The std is the sample std (divisor G - 1). A group of equal rewards has advantages of exactly zero.

    Args:
        raw_rewards: (N,), those of a group next to each other.
        group_size: responses per question, G >= 2 if `normalize_by_std`.
        advantage_eps: added to the std.
        normalize_by_std: divide by the std.

    Raises:
        ValueError: N is not a multiple of G, or the std is asked of groups of one.

    >>> normalize_within_groups(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2, 1e-6, normalize_by_std=False)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    num_rollouts = len(raw_rewards)
    if group_size < 1 or num_rollouts == 0 or num_rollouts % group_size:
        raise ValueError(f"{num_rollouts} responses do not make whole groups of group_size = {group_size}")
    if normalize_by_std and group_size == 1:
        raise ValueError("group_size = 1 has no standard deviation: use groups of 2 or more")
    groups = raw_rewards.view(-1, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + advantage_eps)
    # The mean of equal numbers can differ from them by rounding: such a group teaches nothing, exactly.
    is_uniform = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(is_uniform, 0.0).flatten()


def compute_naive_policy_gradient_loss(
    raw_rewards_or_advantages: Float[Tensor, "batch 1"], policy_log_probs: Float[Tensor, "batch sequence"]
) -> Float[Tensor, "batch sequence"]:
    """Return the per-token REINFORCE loss, - A log pi(y_t), of shape (B, T).

    Args:
        raw_rewards_or_advantages: (B, 1), one number per response.
        policy_log_probs: (B, T), with gradient.

    Raises:
        ValueError: the first is not (B, 1); as (B,) it would be spread over the tokens, not over the rows.

    Source: Williams 1992; CS336 Assignment 5, problem compute_naive_policy_gradient_loss.

    >>> compute_naive_policy_gradient_loss(torch.tensor([[2.0]]), torch.tensor([[-1.0, -0.5]]))
    tensor([[2., 1.]])
    """
    _check_one_per_row("raw_rewards_or_advantages", raw_rewards_or_advantages, policy_log_probs)
    return -raw_rewards_or_advantages * policy_log_probs


def compute_grpo_clip_loss(
    advantages: Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch sequence"],
    old_log_probs: Float[Tensor, "batch sequence"],
    cliprange: float,
) -> tuple[Float[Tensor, "batch sequence"], dict[str, Tensor]]:
    """Return the per-token clipped loss, - min(rho A, clip(rho, 1 - eps, 1 + eps) A), of shape (B, T).

    Args:
        advantages: (B, 1), one number per response.
        policy_log_probs: (B, T), with gradient.
        old_log_probs: (B, T), of the policy that sampled, without gradient.
        cliprange: eps > 0.

    Returns:
        The loss; and per token (B, T), without gradient: `ratio`, `is_clipped_low` (rho < 1 - eps with A < 0)
        and `is_clipped_high` (rho > 1 + eps with A > 0), the tokens whose gradient the clip removes.

    Raises:
        ValueError: advantages are not (B, 1).

    Source: Schulman et al. 2017, equation 7; CS336 Assignment 5, problem compute_grpo_clip_loss.
    """
    _check_one_per_row("advantages", advantages, policy_log_probs)
    ratio = torch.exp(policy_log_probs - old_log_probs)
    clipped = ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    per_token_loss = -torch.minimum(ratio * advantages, clipped * advantages)
    metadata = {
        "ratio": ratio.detach(),
        "is_clipped_low": (ratio.detach() < 1.0 - cliprange) & (advantages < 0),
        "is_clipped_high": (ratio.detach() > 1.0 + cliprange) & (advantages > 0),
    }
    return per_token_loss, metadata


def compute_policy_gradient_loss(
    policy_log_probs: Float[Tensor, "batch sequence"],
    loss_type: str,
    raw_rewards: Float[Tensor, "batch 1"] | None = None,
    advantages: Float[Tensor, "batch 1"] | None = None,
    old_log_probs: Float[Tensor, "batch sequence"] | None = None,
    cliprange: float | None = None,
) -> tuple[Float[Tensor, "batch sequence"], dict[str, Tensor]]:
    """Return the per-token loss of a loss type, (B, T), and its per-token metadata.

    Raises:
        ValueError: the loss type is unknown, or an argument that it needs is missing (all are named).

    Source: CS336 Assignment 5, problem compute_policy_gradient_loss; grpo_no_clip: its clip ablation.
    """
    if loss_type not in REQUIRED_ARGUMENTS:
        raise ValueError(f"loss_type = {loss_type!r}: use one of {', '.join(REQUIRED_ARGUMENTS)}")
    given = {
        "raw_rewards": raw_rewards,
        "advantages": advantages,
        "old_log_probs": old_log_probs,
        "cliprange": cliprange,
    }
    missing = [name for name in REQUIRED_ARGUMENTS[loss_type] if given[name] is None]
    if missing:
        raise ValueError(
            f"loss_type = {loss_type} needs {' and '.join(missing)}: pass {'it' * (len(missing) == 1) or 'them'}"
        )
    if loss_type == "no_baseline":
        assert raw_rewards is not None
        return compute_naive_policy_gradient_loss(raw_rewards, policy_log_probs), {}
    assert advantages is not None
    if loss_type == "reinforce_with_baseline":
        return compute_naive_policy_gradient_loss(advantages, policy_log_probs), {}
    assert old_log_probs is not None
    if loss_type == "grpo_no_clip":
        _check_one_per_row("advantages", advantages, policy_log_probs)
        ratio = torch.exp(policy_log_probs - old_log_probs)
        return -ratio * advantages, {"ratio": ratio.detach()}
    assert cliprange is not None
    return compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange)


def masked_mean(
    tensor: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | Int[Tensor, "..."], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Return the mean over the masked elements; NaN (0/0) where a slice has none.

    What stands outside the mask, NaN and infinities included, changes neither value nor gradient.

    Args:
        tensor: any shape.
        mask: same shape; nonzero elements count.
        dim: dimension to average over; None averages over all.

    Source: CS336 Assignment 5, problem masked_mean.

    >>> masked_mean(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 0, 1]))
    tensor(2.)
    """
    if tensor.shape != mask.shape:
        raise ValueError(f"tensor is {tuple(tensor.shape)} and mask {tuple(mask.shape)}: give both the same shape")
    is_kept = mask.bool()
    kept = torch.where(is_kept, tensor, torch.zeros_like(tensor))
    return kept.sum() / is_kept.sum() if dim is None else kept.sum(dim=dim) / is_kept.sum(dim=dim)


def normalize_lengths(
    per_token_loss: Float[Tensor, "batch sequence"],
    response_mask: Bool[Tensor, "batch sequence"],
    length_normalization: str,
    num_step_rows: int,
    normalize_constant: float | None = None,
) -> Float[Tensor, ""]:
    """Reduce the token losses of a microbatch to its share of the optimizer step's loss.

        masked_mean        1/N sum_b (1 / sum_t m_bt) sum_t m_bt l_bt     every response weighs the same
        masked_normalize   1/N sum_b 1/C sum_t m_bt l_bt                  C: sampling_max_tokens (Dr. GRPO)
        token_mean         1/C sum_b sum_t m_bt l_bt                      C: response tokens of the step (DAPO)

    The shares add up to the same loss however the step's rows are divided into microbatches, and rows of zero
    loss may be left out, since neither N nor C is counted from the rows given.

    Args:
        per_token_loss: (B, T).
        response_mask: (B, T); for masked_mean every row has at least one response token.
        length_normalization: one of the above.
        num_step_rows: N, rows of the whole optimizer step.
        normalize_constant: C; not for masked_mean.

    Raises:
        ValueError: the normalization is unknown, or lacks its constant.

    Sources: CS336 Assignment 5 (masked_mean); Liu et al. 2025 (Dr. GRPO); Yu et al. 2025, equation 8 (DAPO).
    """
    if length_normalization not in LENGTH_NORMALIZATIONS:
        raise ValueError(
            f"length_normalization = {length_normalization!r}: use one of {', '.join(LENGTH_NORMALIZATIONS)}"
        )
    if length_normalization == "masked_mean":
        return masked_mean(per_token_loss, response_mask, dim=-1).sum() / num_step_rows
    if normalize_constant is None:
        raise ValueError(f"length_normalization = {length_normalization} needs normalize_constant: pass it")
    summed = masked_normalize(per_token_loss, response_mask, normalize_constant)
    return summed / num_step_rows if length_normalization == "masked_normalize" else summed


def grpo_microbatch_train_step(
    policy_log_probs: Float[Tensor, "batch sequence"],
    response_mask: Bool[Tensor, "batch sequence"],
    gradient_accumulation_steps: int,
    loss_type: str,
    raw_rewards: Float[Tensor, "batch 1"] | None = None,
    advantages: Float[Tensor, "batch 1"] | None = None,
    old_log_probs: Float[Tensor, "batch sequence"] | None = None,
    cliprange: float | None = None,
    *,
    length_normalization: str = "masked_mean",
    normalize_constant: float | None = None,
    num_step_rows: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Any]]:
    """Compute the policy-gradient loss of one microbatch and add its gradient to the parameters' `.grad`.

        loss = 1 / (B S) sum_b masked_mean_t loss_bt        S: gradient_accumulation_steps

    Args: as in `compute_policy_gradient_loss`; response_mask (B, T) is true at response tokens.
        length_normalization, normalize_constant: as in `normalize_lengths`.
        num_step_rows: rows of the whole optimizer step, where microbatches differ in size; default B S.

    Returns:
        The loss as differentiated, without gradient; and metadata, sums over the response tokens of this
        microbatch to be added up over a step: `num_tokens`; with a ratio `ratio_sum` and the maximum
        `ratio_max`; with a clip `num_clipped_low` and `num_clipped_high`.

    Source: CS336 Assignment 5, problem grpo_microbatch_train_step.
    """
    if gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps = {gradient_accumulation_steps}: must be at least 1")
    mask = response_mask.bool()
    # Outside the mask a ratio could be infinite, and 0 * inf in its backward pass NaN: nothing there may count.
    policy_log_probs = torch.where(mask, policy_log_probs, 0.0)
    if old_log_probs is not None:
        old_log_probs = torch.where(mask, old_log_probs, 0.0)
    per_token_loss, per_token_metadata = compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange
    )
    if num_step_rows is None:
        num_step_rows = len(policy_log_probs) * gradient_accumulation_steps
    step_loss = normalize_lengths(per_token_loss, mask, length_normalization, num_step_rows, normalize_constant)
    step_loss.backward()
    metadata: dict[str, Any] = {"num_tokens": mask.sum()}
    if "ratio" in per_token_metadata:
        ratio = per_token_metadata["ratio"][mask]
        metadata |= {"ratio_sum": ratio.sum(), "ratio_max": ratio.max()}
    for side in ("low", "high"):
        if f"is_clipped_{side}" in per_token_metadata:
            metadata[f"num_clipped_{side}"] = (per_token_metadata[f"is_clipped_{side}"] & mask).sum()
    return step_loss.detach(), metadata


def _check_one_per_row(name: str, values: Tensor, policy_log_probs: Tensor) -> None:
    if values.shape != (len(policy_log_probs), 1):
        raise ValueError(
            f"{name} is {tuple(values.shape)}: give one number per row, as ({len(policy_log_probs)}, 1) for log-probs "
            f"of {tuple(policy_log_probs.shape)}"
        )
