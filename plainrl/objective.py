"""Advantages, the loss of each response token of a microbatch, and the metrics of an optimizer step.

    l_t = w_t loss(y_t) + kl_coefficient k_t - entropy_coefficient H_t

w_t is the weight of an engine correction, k_t an estimate of the KL divergence from the first policy, and H_t the
entropy of the policy at that token. All three are off by default. LENGTH_NORMALIZATIONS then averages l_t. A token of
weight 0 still counts in the divisor. A weight w_t does not multiply the other two terms.

Source: plainrl/corrections.py has that of w_t and k_t.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from GRPO_helper import Loss, LossInputs, TokenLosses, normalize_within_groups
from plainrl.config import GRPOConfig
from plainrl.corrections import ENGINE_CORRECTIONS, KL_ESTIMATORS, RATIO_LEVELS, engine_weights
from plainrl.microbatches import rank_efficiency
from plainrl.records import Rollout, UserError
from plainrl.rollouts import old_log_probs_in
from plainrl.selection import training_reward

OF_CLIP = ("ratio_mean", "ratio_max", "clip_fraction_low", "clip_fraction_high")  # null for losses without them
OF_TERMS = ("engine_weight_mean", "engine_weight_square_mean", "engine_corrected_fraction", "kl")
OF_STEP = ("loss", "num_trained_rows", "token_entropy", "grad_norm", "loss_scale", "learning_rate")
TAKEN_NAMES = {*OF_STEP, *OF_TERMS, "engine_effective_sample_size"}


def compute_advantages(rewards: Tensor, config: GRPOConfig) -> Tensor:
    """Return the advantages of a rollout batch, (N,), from its rewards, (N,): see `normalize_within_groups`.

    A group of one response has no std, and is not divided by it.

    Raises:
        UserError: the rewards do not allow the normalization that is asked for.
    """
    scale = config.use_std_normalization if config.group_size > 1 else False
    try:
        return normalize_within_groups(rewards, config.group_size, config.advantage_eps, scale)
    except ValueError as error:
        raise UserError(f"use_std_normalization = {scale}: {error}") from None


def compute_token_losses(
    part: Sequence[Rollout], scores: Mapping[str, Tensor], mask: Tensor, config: GRPOConfig
) -> TokenLosses:
    """Return the loss of each response token, (B, T), and metadata as a loss returns them.

    Args:
        part: the rollouts of a microbatch.
        scores: their `log_probs` and `token_entropy`, (B, T), with gradient.
        mask: (B, T), true at response tokens.
        config: the loss, its terms and their coefficients.

    Raises:
        UserError: a loss of the user's own returned something else than a loss.
    """
    inputs = make_loss_inputs(part, scores["log_probs"], mask, config)
    losses, metadata = check_token_losses(config.loss, inputs)
    if correct := ENGINE_CORRECTIONS[config.engine_correction]:
        engine = [value for row in part for value in row.response.log_probs]
        # pi_old itself: inputs.old_log_probs holds another number with ratio_level=sequence.
        old_log_probs = old_log_probs_of(part, inputs.log_probs, mask, config)
        weights, is_changed = engine_weights(
            *(correct, old_log_probs, _spread(torch.tensor(engine, dtype=torch.float64), inputs.log_probs, mask), mask),
            *(config.engine_correction_cap, config.sampling_min_tokens),
        )
        losses = losses * weights
        squares = {"engine_weight_mean": weights, "engine_weight_square_mean": weights.square()}
        metadata = metadata | squares | {"engine_corrected_fraction": is_changed}
    if config.kl_coefficient:
        reference = torch.cat([cast(Tensor, row.reference_log_probs) for row in part])
        difference = inputs.log_probs - _spread(reference, inputs.log_probs, mask)
        divergence = KL_ESTIMATORS[config.kl_estimator](difference)
        losses = losses + config.kl_coefficient * divergence
        metadata = metadata | {"kl": divergence.detach()}
    if config.entropy_coefficient:
        losses = losses - config.entropy_coefficient * scores["token_entropy"]
    return losses, metadata


def make_loss_inputs(part: Sequence[Rollout], log_probs: Tensor, mask: Tensor, config: GRPOConfig) -> LossInputs:
    """Return what the loss may look at, for the rows of a microbatch."""
    old_log_probs = old_log_probs_of(part, log_probs, mask, config)
    advantages, rewards = ([[row.advantage] for row in part], [[training_reward(row, config)] for row in part])
    like = {"dtype": log_probs.dtype, "device": log_probs.device}
    return LossInputs(
        log_probs,
        mask,
        advantages=torch.tensor(advantages, **like),
        raw_rewards=torch.tensor(rewards, **like),
        old_log_probs=RATIO_LEVELS[config.ratio_level](log_probs, old_log_probs, mask),
        cliprange=config.cliprange,
        cliprange_high=config.cliprange_high,
        cliprange_dual=config.cliprange_dual,
        ratio_cap=config.ratio_cap,
    )


def old_log_probs_of(part: Sequence[Rollout], log_probs: Tensor, mask: Tensor, config: GRPOConfig) -> Tensor:
    """Return log pi_old, (B, T). On-policy the old policy is the policy, held fixed: nothing has to be scored."""
    return _spread(old_log_probs_in(part), log_probs, mask) if config.is_off_policy else log_probs.detach()


def check_token_losses(loss: Loss, inputs: LossInputs) -> TokenLosses:
    """Return what a loss returns, the loss of each token and its metadata.

    Raises:
        UserError: it returned something else. Only a loss of the user's own does.
    """
    result: Any = loss.function(inputs)
    name, shape = getattr(loss.function, "__name__", loss.function), inputs.log_probs.shape
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
        raise UserError(f"the loss {name} returned {type(result).__name__}: return (losses, metadata)")
    for key, values in {"the losses": result[0], **result[1]}.items():
        if not isinstance(values, Tensor) or values.shape != shape:
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UserError(f"the loss {name} returned {key} as {found}: give one value per token, {tuple(shape)}")
    if taken := TAKEN_NAMES & result[1].keys():
        raise UserError(f"the loss {name} returned metadata {', '.join(sorted(taken))}: each run logs that; rename it")
    return result


def summarize_update(sums: Mapping[str, float]) -> dict[str, float | None]:
    """Return the metrics of an optimizer step from its sums over response tokens. A mean over no token is None."""

    def per_token(name: str) -> float | None:
        return sums[name] / sums["num_tokens"] if name in sums else None

    of_loss = dict.fromkeys(f"train/{name}" for name in OF_CLIP)
    of_loss |= {
        name: sums[name] if name.endswith("_max") else per_token(name) for name in sums if name.startswith("train/")
    }
    if "train/engine_weight_mean" in of_loss:  # (sum w)^2 / (n sum w^2)
        mean, square = of_loss["train/engine_weight_mean"], of_loss.pop("train/engine_weight_square_mean")
        of_loss["train/engine_effective_sample_size"] = mean**2 / square if mean and square else 0.0
    gap_mean = sums["gap_sum"] / sums["num_gap_tokens"] if sums.get("num_gap_tokens") else None
    return {
        "train/loss": sums["loss"],
        "train/num_trained_rows": sums["num_trained_rows"],
        "train/token_entropy": per_token("entropy_sum"),
        **of_loss,
        **rank_efficiency(sums),
        "rollout/log_prob_gap_mean": gap_mean,
        "rollout/log_prob_gap_multiplicative": None if gap_mean is None else torch.tensor(gap_mean).exp().item(),
        "rollout/log_prob_gap_max": None if gap_mean is None else sums["gap_max"],
    }


def _spread(values: Tensor, like: Tensor, mask: Tensor) -> Tensor:
    """Return values of all response tokens, one response after the other, as (B, T), with zeros elsewhere."""
    return torch.zeros_like(like).masked_scatter(mask, values.to(like))
