"""The mathematics of GRPO: advantages, a table of losses, a table of length normalizations.

Symbols: N responses in groups of G to the same question; R the reward, A the advantage; B rows of T positions; m the
response mask; rho_t = pi(y_t) / pi_old(y_t) the importance ratio of a token; eps the clip range.

    advantage     A_i = (R_i - mean of its group) [ / (std of its group + advantage_eps) ]
    losses        no_baseline              -R log pi
                  reinforce_with_baseline  -A log pi
                  grpo_clip                -min(rho A, clip(rho, 1 - eps, 1 + eps) A)
                  grpo_no_clip             -rho A

A new loss is one function of `LossInputs` and one line in `LOSSES`: see docs/how_to.md. `pytest tests/test_losses.py`
then tests it.

Sources: Shao et al. 2024 (DeepSeekMath, GRPO), equations 3 and 4; Liu et al. 2025 (Dr. GRPO: no std);
Stanford CS336 (Spring 2025), Assignment 5, section 7. As in the assignment there is no KL term.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# --- advantages -----------------------------------------------------------------------------------------------------


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
        rollout_responses: N responses. Those to the same question stand next to each other.
        repeated_ground_truths: N answers, each repeated `group_size` times.

    Returns:
        Advantages (N,) and raw rewards (N,), both float32; and metadata: mean, sample std, min and max of the
        rewards, and the fraction of responses whose advantage is zero.

    Raises:
        ValueError: lengths differ, N is not a multiple of G, or a reward is NaN or infinite.

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
        raw_rewards: (N,). Those of a group stand next to each other.
        group_size: responses per question, G >= 2 if `normalize_by_std`.
        advantage_eps: added to the std.
        normalize_by_std: divide by the std.

    Raises:
        ValueError: N is not a multiple of G, the std is asked of groups of one, or a reward is NaN, infinite or too
            large for float32.

    >>> normalize_within_groups(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2, 1e-6, normalize_by_std=False)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    num_rollouts = len(raw_rewards)
    if group_size < 1 or num_rollouts == 0 or num_rollouts % group_size:
        raise ValueError(f"{num_rollouts} responses do not make whole groups of group_size = {group_size}")
    if normalize_by_std and group_size == 1:
        raise ValueError("group_size = 1 has no standard deviation: use groups of 2 or more")
    _require_finite("reward", raw_rewards)
    groups = raw_rewards.view(-1, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + advantage_eps)
    # The mean of equal numbers can differ from them by rounding. Such a group teaches nothing: make it exactly zero.
    is_uniform = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    advantages = advantages.masked_fill(is_uniform, 0.0).flatten()
    _require_finite("advantage", advantages)  # the sum or the square of large rewards may overflow
    return advantages


def _require_finite(name: str, values: Tensor) -> None:
    """Raise a ValueError that names the first value that is NaN or infinite. One would spoil its whole group."""
    wrong = (~torch.isfinite(values)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise ValueError(f"{name} {index} of {len(values)} is {values[index].item()}: give finite rewards below 1e18")


# --- losses ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossInputs:
    """Everything that a loss may look at: the rows of one microbatch.

    What a loss does not need may be None. Log-probs outside the mask must be finite; the training loop has zeros there.

    Raises:
        ValueError: advantages or rewards are not (B, 1). As (B,) they would be spread over tokens instead of rows.
    """

    log_probs: Float[Tensor, "batch sequence"]  # of the policy, with gradient
    mask: Bool[Tensor, "batch sequence"]  # true at response tokens
    advantages: Float[Tensor, "batch 1"] | None = None
    raw_rewards: Float[Tensor, "batch 1"] | None = None
    old_log_probs: Float[Tensor, "batch sequence"] | None = None  # before this batch's first step, without gradient
    cliprange: float | None = None  # eps

    def __post_init__(self) -> None:
        num_rows = len(self.log_probs)
        for name, values in (("advantages", self.advantages), ("raw_rewards", self.raw_rewards)):
            if values is not None and values.shape != (num_rows, 1):
                raise ValueError(
                    f"{name} is {tuple(values.shape)}: give one number per row, as ({num_rows}, 1) for log-probs of "
                    f"{tuple(self.log_probs.shape)}"
                )


# What a loss returns: the loss of each token (B, T), and metadata. These are values per token by name, (B, T) without
# gradient. Each is logged as `train/<name>`: the mean over the response tokens of an optimizer step, or the maximum if
# the name ends in `_max`.
TokenLosses = tuple[Tensor, dict[str, Tensor]]
TAKEN_NAMES = {"loss", "num_trained_rows", "token_entropy", "grad_norm", "loss_scale", "learning_rate"}


def no_baseline(inputs: LossInputs) -> TokenLosses:
    """REINFORCE with the raw reward: l_t = - R log pi(y_t).

    Source: Williams 1992.
    """
    assert inputs.raw_rewards is not None
    return -inputs.raw_rewards * inputs.log_probs, {}


def reinforce_with_baseline(inputs: LossInputs) -> TokenLosses:
    """REINFORCE with the advantage: l_t = - A log pi(y_t). The baseline is the mean reward of the group.

    Source: Williams 1992; Shao et al. 2024.
    """
    assert inputs.advantages is not None
    return -inputs.advantages * inputs.log_probs, {}


def grpo_clip(inputs: LossInputs) -> TokenLosses:
    """The clipped loss of PPO and GRPO: l_t = - min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A).

    Metadata: the ratio, and the tokens whose gradient the clip removes: rho < 1 - eps with A < 0 (low), rho > 1 + eps
    with A > 0 (high).

    Source: Schulman et al. 2017, equation 7; Shao et al. 2024, equation 3.
    """
    assert inputs.advantages is not None and inputs.old_log_probs is not None and inputs.cliprange is not None
    ratio = torch.exp(inputs.log_probs - inputs.old_log_probs)
    low, high = 1.0 - inputs.cliprange, 1.0 + inputs.cliprange
    losses = -torch.minimum(ratio * inputs.advantages, ratio.clamp(low, high) * inputs.advantages)
    return losses, _describe_ratio(ratio) | {
        "clip_fraction_low": (ratio.detach() < low) & (inputs.advantages < 0),
        "clip_fraction_high": (ratio.detach() > high) & (inputs.advantages > 0),
    }


def grpo_no_clip(inputs: LossInputs) -> TokenLosses:
    """The same without the clip: l_t = - rho_t A.

    Source: CS336 Assignment 5, the clip ablation.
    """
    assert inputs.advantages is not None and inputs.old_log_probs is not None
    ratio = torch.exp(inputs.log_probs - inputs.old_log_probs)
    return -ratio * inputs.advantages, _describe_ratio(ratio)


class LossError(ValueError):
    """A loss function returned something that is no loss: the user's mistake, shown as one line."""


@dataclass(frozen=True)
class Loss:
    """A loss of the table: its function, what it needs, and which rows it may skip.

    Args:
        function: from `LossInputs` to the loss of each token and its metadata.
        needs: the fields of `LossInputs`, beside log_probs and mask, that it uses.
        zero_with: "advantages" or "raw_rewards". A row where this is zero has no loss and no gradient, and training
            skips it. None: no row is skipped.
    """

    function: Callable[[LossInputs], TokenLosses]
    needs: tuple[str, ...] = ()
    zero_with: str | None = None

    def __post_init__(self) -> None:
        fields = LossInputs.__dataclass_fields__
        if unknown := set(self.needs) - set(fields):
            raise ValueError(f"needs = {', '.join(sorted(unknown))}: LossInputs has {', '.join(fields)}")
        if self.zero_with not in (None, "advantages", "raw_rewards"):
            raise ValueError(f"zero_with = {self.zero_with}: use advantages, raw_rewards or None")

    def __call__(self, inputs: LossInputs) -> TokenLosses:
        """Return the loss of each token, and its metadata.

        Raises:
            LossError: the function returned something else.
        """
        result = self.function(inputs)
        name, shape = getattr(self.function, "__name__", self.function), inputs.log_probs.shape
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
            raise LossError(f"the loss {name} returned {type(result).__name__}: return (losses, metadata)")
        for key, values in {"the losses": result[0], **result[1]}.items():
            if not isinstance(values, Tensor) or values.shape != shape:
                found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise LossError(f"the loss {name} returned {key} as {found}: give one value per token, {tuple(shape)}")
        if taken := TAKEN_NAMES & result[1].keys():
            raise LossError(
                f"the loss {name} returned metadata {', '.join(sorted(taken))}: each run logs that; rename it"
            )
        return result


LOSSES: dict[str, Loss] = {
    "no_baseline": Loss(no_baseline, needs=("raw_rewards",), zero_with="raw_rewards"),
    "reinforce_with_baseline": Loss(reinforce_with_baseline, needs=("advantages",), zero_with="advantages"),
    "grpo_clip": Loss(grpo_clip, needs=("advantages", "old_log_probs", "cliprange"), zero_with="advantages"),
    "grpo_no_clip": Loss(grpo_no_clip, needs=("advantages", "old_log_probs"), zero_with="advantages"),
}


def reduce_metadata(metadata: Mapping[str, Tensor], mask: Bool[Tensor, "batch sequence"]) -> dict[str, Tensor]:
    """Reduce a loss's metadata to the sum over the response tokens, or the maximum if the name ends in `_max`.

    >>> reduce_metadata({"ratio_max": torch.tensor([[1.0, 3.0]])}, torch.tensor([[True, False]]))
    {'ratio_max': tensor(1.)}
    """
    return {
        name: values[mask].max() if name.endswith("_max") else values[mask].sum() for name, values in metadata.items()
    }


# --- from token losses to one number --------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSize:
    """How large an optimizer step is, whatever its microbatches: the divisors of the length normalizations."""

    num_rows: int  # N, responses of the step, skipped ones included
    num_tokens: int  # their response tokens; those left out by mask_truncated_responses do not count
    max_response_tokens: int  # the longest that a response may be (sampling_max_tokens)


def masked_mean(
    tensor: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | Int[Tensor, "..."], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Return the mean over the masked elements; NaN (0/0) where a slice has none.

    What stands outside the mask changes neither value nor gradient, NaN and infinities included.

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


def mean_per_response(losses: Tensor, mask: Tensor, size: StepSize) -> Tensor:
    """1/N sum_b (1 / sum_t m_bt) sum_t m_bt l_bt. Every response weighs the same, whatever its length.

    Every row must have a response token. Source: CS336 Assignment 5; Shao et al. 2024, equation 3.
    """
    return masked_mean(losses, mask, dim=-1).sum() / size.num_rows


def sum_over_longest(losses: Tensor, mask: Tensor, size: StepSize) -> Tensor:
    """1/N sum_b 1/L sum_t m_bt l_bt. L is the longest that a response may be, so every token weighs the same.

    Source: Liu et al. 2025 (Dr. GRPO).
    """
    return torch.where(mask, losses, 0.0).sum() / float(size.max_response_tokens) / size.num_rows


def mean_per_token(losses: Tensor, mask: Tensor, size: StepSize) -> Tensor:
    """1/M sum_b sum_t m_bt l_bt. M counts the response tokens of the whole step.

    Source: Yu et al. 2025 (DAPO), equation 8.
    """
    return torch.where(mask, losses, 0.0).sum() / float(size.num_tokens)


# Each gives a microbatch's share of the step's loss. The shares add up to the same loss however the rows are divided
# into microbatches. Rows of zero loss may be left out, since no divisor is counted from the rows given.
LENGTH_NORMALIZATIONS: dict[str, Callable[[Tensor, Tensor, StepSize], Tensor]] = {
    "masked_mean": mean_per_response,
    "masked_normalize": sum_over_longest,
    "token_mean": mean_per_token,
}


# --- the assignment's functions -------------------------------------------------------------------------------------


def compute_naive_policy_gradient_loss(
    raw_rewards_or_advantages: Float[Tensor, "batch 1"], policy_log_probs: Float[Tensor, "batch sequence"]
) -> Float[Tensor, "batch sequence"]:
    """Return the REINFORCE loss of each token, - A log pi(y_t), of shape (B, T).

    Args:
        raw_rewards_or_advantages: (B, 1), one number per response.
        policy_log_probs: (B, T), with gradient.

    Raises:
        ValueError: the first is not (B, 1).

    Source: CS336 Assignment 5, problem compute_naive_policy_gradient_loss.

    >>> compute_naive_policy_gradient_loss(torch.tensor([[2.0]]), torch.tensor([[-1.0, -0.5]]))
    tensor([[2., 1.]])
    """
    everywhere = torch.ones_like(policy_log_probs, dtype=torch.bool)
    return reinforce_with_baseline(LossInputs(policy_log_probs, everywhere, advantages=raw_rewards_or_advantages))[0]


def compute_grpo_clip_loss(
    advantages: Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch sequence"],
    old_log_probs: Float[Tensor, "batch sequence"],
    cliprange: float,
) -> tuple[Float[Tensor, "batch sequence"], dict[str, Tensor]]:
    """Return the clipped loss of each token, (B, T), and its metadata: see `grpo_clip`.

    Source: CS336 Assignment 5, problem compute_grpo_clip_loss.
    """
    return compute_policy_gradient_loss(
        policy_log_probs, "grpo_clip", advantages=advantages, old_log_probs=old_log_probs, cliprange=cliprange
    )


def compute_policy_gradient_loss(
    policy_log_probs: Float[Tensor, "batch sequence"],
    loss_type: str,
    raw_rewards: Float[Tensor, "batch 1"] | None = None,
    advantages: Float[Tensor, "batch 1"] | None = None,
    old_log_probs: Float[Tensor, "batch sequence"] | None = None,
    cliprange: float | None = None,
    *,
    response_mask: Bool[Tensor, "batch sequence"] | None = None,
) -> tuple[Float[Tensor, "batch sequence"], dict[str, Tensor]]:
    """Return the loss of each token by the name of a loss, (B, T), and its metadata.

    Args: as in `LossInputs`.
        loss_type: a name of `LOSSES`.
        response_mask: what a loss over sequences counts; default: all positions.

    Raises:
        ValueError: the loss is unknown, or an argument that it needs is missing (all are named).

    Source: CS336 Assignment 5, problem compute_policy_gradient_loss.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type = {loss_type!r}: use one of {', '.join(LOSSES)}")
    if response_mask is None:
        response_mask = torch.ones_like(policy_log_probs, dtype=torch.bool)
    inputs = LossInputs(policy_log_probs, response_mask, advantages, raw_rewards, old_log_probs, cliprange)
    missing = [name for name in LOSSES[loss_type].needs if getattr(inputs, name) is None]
    if missing:
        raise ValueError(
            f"loss_type = {loss_type} needs {' and '.join(missing)}: pass {'them' if missing[1:] else 'it'}"
        )
    return LOSSES[loss_type](inputs)


def grpo_microbatch_train_step(
    policy_log_probs: Float[Tensor, "batch sequence"],
    response_mask: Bool[Tensor, "batch sequence"],
    gradient_accumulation_steps: int,
    loss_type: str,
    raw_rewards: Float[Tensor, "batch 1"] | None = None,
    advantages: Float[Tensor, "batch 1"] | None = None,
    old_log_probs: Float[Tensor, "batch sequence"] | None = None,
    cliprange: float | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Any]]:
    """Compute the policy-gradient loss of one microbatch and add its gradient to the parameters' `.grad`.

        loss = 1 / (B S) sum_b masked_mean_t l_bt        S: gradient_accumulation_steps

    GRPO_train.py does the same in `accumulate_gradients`, for microbatches of unequal size.

    Args: as in `compute_policy_gradient_loss`; response_mask (B, T) is true at response tokens.

    Returns:
        The loss as differentiated, without gradient; and metadata: `num_tokens`, and what `reduce_metadata` makes of
        the loss's own.

    Source: CS336 Assignment 5, problem grpo_microbatch_train_step.
    """
    if gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps = {gradient_accumulation_steps}: must be at least 1")
    mask = response_mask.bool()
    # Outside the mask a ratio could be infinite, and 0 * inf in its backward pass is NaN. Nothing there may count.
    policy_log_probs = torch.where(mask, policy_log_probs, 0.0)
    if old_log_probs is not None:
        old_log_probs = torch.where(mask, old_log_probs, 0.0)
    losses, metadata = compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange, response_mask=mask
    )
    loss = masked_mean(losses, mask, dim=-1).sum() / (len(losses) * gradient_accumulation_steps)
    loss.backward()
    return loss.detach(), {"num_tokens": mask.sum()} | reduce_metadata(metadata, mask)


def _describe_ratio(ratio: Tensor) -> dict[str, Tensor]:
    return {"ratio_mean": ratio.detach(), "ratio_max": ratio.detach()}
