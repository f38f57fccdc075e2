"""The mathematics of GRPO: advantages, a table of losses, a table of length normalizations.

Symbols: N responses in groups of G to the same question; R the reward, A the advantage; B rows of T positions; m the
response mask; rho_t = pi(y_t) / pi_old(y_t) the importance ratio of a token; eps the clip range; sg stop-gradient.

    advantage     A_i = (R_i - mean of its group) [ / a scale, see `ADVANTAGE_SCALES` ]
    losses        no_baseline              -R log pi
                  reinforce_with_baseline  -A log pi
                  grpo_clip                -min(rho A, clip(rho, 1 - eps, 1 + eps) A)
                  grpo_no_clip             -rho A
                  cispo                    -sg(min(rho, cap)) A log pi

A new loss is one function of `LossInputs` and one line in `LOSSES`: see docs/how_to.md. `pytest tests/test_losses.py`
then tests it. Engine weights, KL terms and GSPO's ratio are in plainrl/corrections.py; objective.py applies them.

Sources: Shao et al. 2024 (DeepSeekMath, GRPO), equation 3 and section 4.1.2; Liu et al. 2025 (Dr. GRPO: no std);
Stanford CS336 (Spring 2025), Assignment 5, section 7. What came later is cited where it stands.
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

    GRPO_train.py grades responses while others are sampled, and then calls `normalize_within_groups` alone.
    Args: group_size, advantage_eps, normalize_by_std: as in `normalize_within_groups`.
        reward_fn: maps (response, ground truth) to a dictionary with `reward`.
        rollout_responses: N responses. Those to the same question stand next to each other.
        repeated_ground_truths: N ground truths: that of each question stands `group_size` times in a row.

    Returns:
        Advantages (N,) and raw rewards (N,), float32; and metadata: mean, sample std, min and max of the rewards, and
        the fraction of advantages that are zero.

    Raises:
        ValueError: the lists differ in length, or as `normalize_within_groups` raises it.

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


def group_mean(groups: Tensor, advantage_eps: float) -> Tensor:
    """Return the mean of each group of rewards that are 0 or more. Source: MaxRL (arXiv 2602.02710)."""
    if groups.min() < 0:
        raise ValueError(f"a reward is {groups.min().item():g}: divide by the mean only if rewards are 0 or more")
    return groups.mean(dim=1, keepdim=True)


# Divisors of R - mean, from rewards (N / G, G) and advantage_eps. Each std is a sample std: it divides by n - 1.
ADVANTAGE_SCALES: dict[bool | str, Callable[[Tensor, float], Tensor] | None] = {
    True: lambda groups, advantage_eps: groups.std(dim=1, keepdim=True) + advantage_eps,
    False: None,
    "batch": lambda groups, advantage_eps: groups.std() + advantage_eps,  # Lite PPO: Liu et al. 2025
    "mean": group_mean,
}


def normalize_within_groups(
    raw_rewards: Float[Tensor, " rollouts"], group_size: int, advantage_eps: float, normalize_by_std: bool | str
) -> Float[Tensor, " rollouts"]:
    """Subtract from each reward the mean of its group.

        A_i = R_i - mean(R_group),    divided by ADVANTAGE_SCALES[normalize_by_std]

    A group of equal rewards has advantages of exactly zero.

    Args:
        raw_rewards: (N,). Those of a group stand next to each other.
        group_size: responses per question, G.
        advantage_eps: added to a std.
        normalize_by_std: a key of ADVANTAGE_SCALES. All but False need groups of two or more.

    Raises:
        ValueError: there are no whole groups, or a reward is NaN, infinite or too large, or with `mean` negative.

    >>> normalize_within_groups(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2, 1e-6, normalize_by_std=False)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    num_rollouts = len(raw_rewards)
    if group_size < 1 or num_rollouts == 0 or num_rollouts % group_size:
        raise ValueError(f"{num_rollouts} responses do not make whole groups of group_size = {group_size}")
    scale = ADVANTAGE_SCALES[normalize_by_std]
    if scale and group_size == 1:
        raise ValueError("group_size = 1 has no standard deviation: use groups of 2 or more")
    _require_finite("reward", raw_rewards)
    groups = raw_rewards.view(-1, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / scale(groups, advantage_eps)
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
    Advantages and rewards that are not (B, 1) are refused: as (B,) they would be spread over tokens instead of rows.
    """

    log_probs: Float[Tensor, "batch sequence"]  # of the policy, with gradient
    mask: Bool[Tensor, "batch sequence"]  # true at response tokens
    advantages: Float[Tensor, "batch 1"] | None = None
    raw_rewards: Float[Tensor, "batch 1"] | None = None
    old_log_probs: Float[Tensor, "batch sequence"] | None = None  # log pi_old; ratio_level=sequence: see corrections.py
    cliprange: float | None = None  # eps
    cliprange_high: float | None = None  # eps above 1; None: cliprange
    cliprange_dual: float = 0.0  # c, the bound of the loss where A < 0; 0: none
    ratio_cap: float | None = None  # the largest ratio that counts

    def __post_init__(self) -> None:
        shape, wanted = tuple(self.log_probs.shape), (len(self.log_probs), 1)
        for name, values in (("advantages", self.advantages), ("raw_rewards", self.raw_rewards)):
            if values is not None and values.shape != wanted:
                found = tuple(values.shape)
                raise ValueError(f"{name} is {found}: give one number per row, as {wanted} for log-probs of {shape}")


# What a loss returns: the loss of each token (B, T), and metadata: values per token by name, (B, T), without gradient.
# Each is logged as `train/<name>`: the mean over the tokens trained on, or the maximum if the name ends in `_max`.
# Tokens of skipped rows are not trained on, and do not count.
TokenLosses = tuple[Tensor, dict[str, Tensor]]
MAX_LOG_RATIO = 20.0


def no_baseline(inputs: LossInputs) -> TokenLosses:
    """REINFORCE with the raw reward: l_t = - R log pi(y_t). Source: Williams 1992."""
    assert inputs.raw_rewards is not None
    return -inputs.raw_rewards * inputs.log_probs, {}


def reinforce_with_baseline(inputs: LossInputs) -> TokenLosses:
    """REINFORCE with the advantage: l_t = - A log pi(y_t). The baseline is the mean reward of the group.

    Source: Williams 1992; Shao et al. 2024.
    """
    assert inputs.advantages is not None
    return -inputs.advantages * inputs.log_probs, {}


def importance_ratio(inputs: LossInputs) -> Tensor:
    """Return rho_t = exp(log pi(y_t) - log pi_old(y_t)), never infinite or NaN.

    The exponent is held within +-20. Where it is held, the gradient is zero.
    """
    assert inputs.old_log_probs is not None
    return torch.exp((inputs.log_probs - inputs.old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def grpo_clip(inputs: LossInputs) -> TokenLosses:
    """The clipped loss of PPO and GRPO: l_t = - min(rho_t A, clip(rho_t, 1 - eps, 1 + eps_high) A).

    With `cliprange_dual` = c it is at most - c A where A < 0. Metadata: the ratio, and the tokens whose gradient the
    clip removes: rho < 1 - eps with A < 0 (low), rho > 1 + eps_high with A > 0 (high), rho > c with A < 0 (dual).

    Source: Schulman et al. 2017, equation 7; Shao et al. 2024, equation 3; eps_high: Yu et al. 2025 (DAPO); c: Ye et
    al. 2020 (arXiv 1912.09729).
    """
    assert inputs.advantages is not None and inputs.cliprange is not None
    ratio, advantages = importance_ratio(inputs), inputs.advantages
    high = 1.0 + (inputs.cliprange if inputs.cliprange_high is None else inputs.cliprange_high)
    low, dual = 1.0 - inputs.cliprange, inputs.cliprange_dual
    losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    metadata = _describe_ratio(ratio) | {
        "clip_fraction_low": (ratio.detach() < low) & (advantages < 0),
        "clip_fraction_high": (ratio.detach() > high) & (advantages > 0),
    }
    if dual:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual * advantages), losses)
        metadata["clip_fraction_dual"] = (ratio.detach() > dual) & (advantages < 0)
    return losses, metadata


def grpo_no_clip(inputs: LossInputs) -> TokenLosses:
    """The same without the clip: l_t = - rho_t A. Source: CS336 Assignment 5, the clip ablation."""
    assert inputs.advantages is not None
    ratio = importance_ratio(inputs)
    return -ratio * inputs.advantages, _describe_ratio(ratio)


def cispo(inputs: LossInputs) -> TokenLosses:
    """REINFORCE with a capped importance weight: l_t = - sg(min(rho_t, cap)) A log pi(y_t). No token is left out.

    Source: MiniMax 2025 (MiniMax-M1, CISPO); Khatri et al. 2025 (ScaleRL: the cap is that of the ratio itself).
    """
    assert inputs.advantages is not None and inputs.ratio_cap is not None
    ratio = importance_ratio(inputs).detach()
    losses = -ratio.clamp(max=inputs.ratio_cap) * inputs.advantages * inputs.log_probs
    return losses, _describe_ratio(ratio) | {"ratio_capped_fraction": ratio > inputs.ratio_cap}


@dataclass(frozen=True)
class Loss:
    """A loss of the table: its function, what it needs, and which rows it may skip."""

    function: Callable[[LossInputs], TokenLosses]
    needs: tuple[str, ...] = ()  # the fields of LossInputs, beside log_probs and mask, that it uses
    # "advantages" or "raw_rewards": a row where this is zero has no loss and no gradient, so that training skips it.
    zero_with: str | None = None
    options: tuple[str, ...] = ()  # the fields that it uses if they are set

    def __post_init__(self) -> None:
        fields = LossInputs.__dataclass_fields__
        for key, names in (("needs", self.needs), ("options", self.options)):
            if unknown := set(names) - set(fields):
                raise ValueError(f"{key} = {', '.join(sorted(unknown))}: LossInputs has {', '.join(fields)}")
        if self.zero_with not in (None, "advantages", "raw_rewards"):
            raise ValueError(f"zero_with = {self.zero_with}: use advantages, raw_rewards or None")

    def __call__(self, inputs: LossInputs) -> TokenLosses:
        """Return the loss of each token, and its metadata."""
        return self.function(inputs)


LOSSES: dict[str, Loss] = {
    "no_baseline": Loss(no_baseline, ("raw_rewards",), "raw_rewards"),
    "reinforce_with_baseline": Loss(reinforce_with_baseline, ("advantages",), "advantages"),
    "grpo_clip": Loss(
        grpo_clip, ("advantages", "old_log_probs", "cliprange"), "advantages", ("cliprange_high", "cliprange_dual")
    ),
    "grpo_no_clip": Loss(grpo_no_clip, ("advantages", "old_log_probs"), "advantages"),
    "cispo": Loss(cispo, ("advantages", "old_log_probs", "ratio_cap"), "advantages"),
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
    """Return the mean over the elements where the mask is not zero; NaN (0/0) where a slice has none.

    What stands outside the mask changes neither value nor gradient, NaN and infinities included. `dim` is the dimension
    to average over; None averages over all.

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
    """1/N sum_b 1/L sum_t m_bt l_bt. L is the longest that a response may be. Source: Liu et al. 2025 (Dr. GRPO)."""
    return torch.where(mask, losses, 0.0).sum() / float(size.max_response_tokens) / size.num_rows


def mean_per_token(losses: Tensor, mask: Tensor, size: StepSize) -> Tensor:
    """1/M sum_b sum_t m_bt l_bt. M: response tokens of the step, as in verl. DAPO, eq. 8: those of each group."""
    return torch.where(mask, losses, 0.0).sum() / float(size.num_tokens)


# Each gives a microbatch's share of the step's loss. The shares add up to the same loss however the rows are divided
# into microbatches. Rows of zero loss may be left out, since no divisor is counted from the rows given.
LENGTH_NORMALIZATIONS: dict[str, Callable[[Tensor, Tensor, StepSize], Tensor]] = {
    "masked_mean": mean_per_response,
    "masked_normalize": sum_over_longest,
    "token_mean": mean_per_token,
}


# --- the assignment's functions: the training loop takes the two tables above instead --------------------------------


def compute_naive_policy_gradient_loss(
    raw_rewards_or_advantages: Float[Tensor, "batch 1"], policy_log_probs: Float[Tensor, "batch sequence"]
) -> Float[Tensor, "batch sequence"]:
    """Return the REINFORCE loss of each token, - A log pi(y_t), (B, T). Raise a ValueError if A is not (B, 1).

    Source: CS336 Assignment 5, problem compute_naive_policy_gradient_loss.

    >>> compute_naive_policy_gradient_loss(torch.tensor([[2.0]]), torch.tensor([[-1.0, -0.5]]))
    tensor([[2., 1.]])
    """
    return compute_policy_gradient_loss(
        policy_log_probs, "reinforce_with_baseline", advantages=raw_rewards_or_advantages
    )[0]


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
    **options: Any,
) -> tuple[Float[Tensor, "batch sequence"], dict[str, Tensor]]:
    """Return the loss of each token by the name of a loss, (B, T), and its metadata.

    Args: as in `LossInputs`, which has further `options`.
        loss_type: a name of `LOSSES`.
        response_mask: for a loss of your own; none of the table reads it. Default: all positions.

    Raises:
        ValueError: the loss is unknown, or arguments that it needs are missing.

    Source: CS336 Assignment 5, problem compute_policy_gradient_loss.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type = {loss_type!r}: use one of {', '.join(LOSSES)}")
    if response_mask is None:
        response_mask = torch.ones_like(policy_log_probs, dtype=torch.bool)
    inputs = LossInputs(policy_log_probs, response_mask, advantages, raw_rewards, old_log_probs, cliprange, **options)
    missing = [name for name in LOSSES[loss_type].needs if getattr(inputs, name) is None]
    if missing:
        them = "them" if missing[1:] else "it"
        raise ValueError(f"loss_type = {loss_type} needs {' and '.join(missing)}: pass {them}")
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
    **options: Any,
) -> tuple[Float[Tensor, ""], dict[str, Any]]:
    """Compute the policy-gradient loss of one microbatch and add its gradient to the parameters' `.grad`.

        loss = 1 / (B S) sum_b masked_mean_t l_bt        S: gradient_accumulation_steps

    GRPO_train.py does the same in `accumulate_gradients`, for microbatches of unequal size.

    Args: as in `compute_policy_gradient_loss`; response_mask (B, T) is true at response tokens.

    Returns: the loss as differentiated, without gradient; and metadata: `num_tokens`, and the loss's own, over tokens.

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
        *(policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange),
        **({"response_mask": mask} | options),
    )
    loss = masked_mean(losses, mask, dim=-1).sum() / (len(losses) * gradient_accumulation_steps)
    loss.backward()
    means = {n: v if n.endswith("_max") else v / mask.sum() for n, v in reduce_metadata(metadata, mask).items()}
    return loss.detach(), {"num_tokens": mask.sum()} | means


def _describe_ratio(ratio: Tensor) -> dict[str, Tensor]:
    return {"ratio_mean": ratio.detach(), "ratio_max": ratio.detach()}
