"""What a GRPO loss is corrected by: the level of its ratio, weights for the engine's error, a distance to a reference.

Pure functions. A choice is one function and one line in a table, which the configuration reads.

Symbols: B rows of T positions; y_t a token of the response y; pi the policy, pi_old the policy before the first
optimizer step on a batch, pi_engine the engine, pi_ref the first policy; sg stop-gradient; C the key
`engine_correction_cap`.

    RATIO_LEVELS         s_t instead of rho_t = pi(y_t) / pi_old(y_t)
    ENGINE_CORRECTIONS   w_t from pi_old(y_t) / pi_engine(y_t), which multiplies the loss of a token
    KL_ESTIMATORS        k_t from d_t = log pi(y_t) - log pi_ref(y_t), which is added to it
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from GRPO_helper import MAX_LOG_RATIO, masked_mean

PerToken = Float[Tensor, "batch sequence"]
Mask = Bool[Tensor, "batch sequence"]

# --- the level of the ratio -----------------------------------------------------------------------------------------


def ratio_of_tokens(log_probs: PerToken, old_log_probs: PerToken, mask: Mask) -> PerToken:
    """Return the old log-probs themselves: each token has its own ratio. Source: Shao et al. 2024 (GRPO)."""
    return old_log_probs


def ratio_of_sequences(log_probs: PerToken, old_log_probs: PerToken, mask: Mask) -> PerToken:
    """Return old log-probs by which each token has the ratio s of its response, the geometric mean of its tokens'.

        log s = 1/|y| sum_t (log pi(y_t) - log pi_old(y_t)),      old_t = sg(log pi(y_t) - log s)

    Then exp(log pi(y_t) - old_t) is s, with the gradient s grad log pi(y_t). Summed over the response and divided by
    |y|, this is the gradient of s as a function of the whole response. The paper's two forms, GSPO and GSPO-token, are
    therefore the same here, as long as the tokens of a response weigh the same. GSPO divides by the length, as
    masked_mean does. With masked_normalize a response counts by its length, which is LUSPO.

    Source: Zheng et al. 2025 (GSPO, arXiv 2507.18071), equations 7 and 14.

    >>> log_probs, old = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.7]])
    >>> (log_probs - ratio_of_sequences(log_probs, old, torch.tensor([[True, True]]))).exp()  # exp((0.5 - 0.3) / 2)
    tensor([[1.1052, 1.1052]])
    """
    log_probs = log_probs.detach()
    log_ratio = masked_mean(log_probs - old_log_probs, mask, dim=-1)[:, None]
    return torch.where(mask, log_probs - log_ratio, old_log_probs)


RATIO_LEVELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "token": ratio_of_tokens,
    "sequence": ratio_of_sequences,
}

# --- the engine's error ---------------------------------------------------------------------------------------------

# The weight of each token, and whether it was cut or masked, both (B, T), from the log of pi_old / pi_engine. This is
# zero where it does not count: outside the response, and where the engine sampled from another distribution.
EngineWeights = tuple[Tensor, Tensor]


def token_truncate(log_weights: PerToken, counts: Mask, cap: float) -> EngineWeights:
    """w_t = min(pi_old(y_t) / pi_engine(y_t), C). Source: Yao et al. 2025 (TIS); they use C = 2."""
    weights = _exp(log_weights)
    return weights.clamp(max=cap), weights > cap


def token_mask(log_weights: PerToken, counts: Mask, cap: float) -> EngineWeights:
    """w_t = pi_old(y_t) / pi_engine(y_t), and zero outside [1/C, C].

    Source: Ling team 2025 (IcePop, arXiv 2510.18855). Their two limits are 0.5 and 5.
    """
    weights = _exp(log_weights)
    is_masked = (weights < 1 / cap) | (weights > cap)
    return weights.masked_fill(is_masked, 0.0), is_masked


def sequence_truncate(log_weights: PerToken, counts: Mask, cap: float) -> EngineWeights:
    """w = min(pi_old(y) / pi_engine(y), C), the product over the response. Source: Liu et al. 2025 (sequence TIS)."""
    weights = _exp(log_weights.sum(dim=-1, keepdim=True)).expand_as(log_weights)
    return weights.clamp(max=cap), weights > cap


def sequence_mask(log_weights: PerToken, counts: Mask, cap: float) -> EngineWeights:
    """w = pi_old(y) / pi_engine(y), the product over the response, and zero above C.

    The product grows with the length: 0.012 nats a token are a factor of 3.3 in 100 tokens.

    Source: Liu et al. 2025 (MIS). It is TRL's default, with C = 3.
    """
    weights = _exp(log_weights.sum(dim=-1, keepdim=True)).expand_as(log_weights)
    return weights.masked_fill(weights > cap, 0.0), weights > cap


def sequence_mean_mask(log_weights: PerToken, counts: Mask, cap: float) -> EngineWeights:
    """w = 1, and zero where the geometric mean of pi_old(y_t) / pi_engine(y_t) over a response is outside [1/C, C].

    The mean of a long response lies close to 1, so that C is 1.001 to 1.1. A geometric mean is no importance weight. It
    chooses responses, but weighs none.

    Source: Liu et al. 2025 (Geo-MIS); verl calls it rejection by the geometric mean.
    """
    mean = log_weights.sum(dim=-1, keepdim=True) / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    is_masked = (mean.abs() > math.log(cap)).expand_as(log_weights)
    return torch.ones_like(log_weights).masked_fill(is_masked, 0.0), is_masked


ENGINE_CORRECTIONS: dict[str, Callable[[Tensor, Tensor, float], EngineWeights] | None] = {
    "none": None,
    "token_truncate": token_truncate,
    "token_mask": token_mask,
    "sequence_truncate": sequence_truncate,
    "sequence_mask": sequence_mask,
    "sequence_mean_mask": sequence_mean_mask,
}


def engine_weights(
    correct: Callable[[Tensor, Tensor, float], EngineWeights],
    old_log_probs: PerToken,
    engine_log_probs: PerToken,
    mask: Mask,
    cap: float,
    num_forced: int = 0,
) -> EngineWeights:
    """Return the weight of each token, without gradient, and whether it was cut or masked.

    The divisors of the loss stay as they are. A masked token still counts in the length of its response, so that the
    others do not gain weight.

    Args:
        correct: a function of ENGINE_CORRECTIONS.
        old_log_probs: (B, T), of the policy that the engine copied, in nats.
        engine_log_probs: (B, T), of the engine, under the distribution that it sampled.
        mask: (B, T), true at response tokens.
        cap: C, 1 or more.
        num_forced: the first tokens of a response that count as w = 1. The engine samples `sampling_min_tokens` tokens
            without EOS, from another distribution than the policy's.
    """
    counts = mask & (mask.cumsum(dim=-1) > num_forced)
    log_weights = torch.where(counts, old_log_probs.detach() - engine_log_probs, 0.0)
    weights, is_changed = correct(log_weights, counts, cap)
    return weights, is_changed & mask


# --- the distance to a reference ------------------------------------------------------------------------------------


def k1(difference: PerToken) -> PerToken:
    """d_t. Its mean is the reverse KL divergence, but its gradient does not pull towards the first policy.

    The mean of grad log pi is zero. Divided by the length, as by masked_mean, it lengthens responses instead.
    """
    return difference


def k2(difference: PerToken) -> PerToken:
    """d_t^2 / 2. The mean of its gradient, d grad log pi, is the reverse KL divergence's, of each next token."""
    return difference.square() / 2


def k3(difference: PerToken) -> PerToken:
    """exp(-d_t) + d_t - 1. Its mean is the reverse KL divergence. While pi is close to pi_ref, it varies less than k1.

    The mean of its gradient, (1 - exp(-d)) grad log pi, is that of the forward KL divergence. For small d this is
    nearly the same. Beyond +-20, d counts as +-20, and the gradient is zero.

    Source: Shao et al. 2024 (GRPO), equation 4.
    """
    difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-difference) + difference


# Means are over responses of the policy itself. Source: Schulman 2020, Approximating KL divergence; the gradients:
# Tang and Munos 2025 (arXiv 2506.09477).
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def _exp(log_weights: Tensor) -> Tensor:
    return log_weights.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
