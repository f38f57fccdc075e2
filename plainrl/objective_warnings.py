"""What settings of a GRPO loss have no effect, or another one than their names promise. `GRPOConfig.warnings` says it.

Each function looks at one part of the objective, and returns one sentence for each thing that it finds.
"""

from GRPO_helper import ADVANTAGE_SCALES, LENGTH_NORMALIZATIONS, group_mean, mean_per_response
from plainrl.config import GRPOConfig
from plainrl.corrections import ENGINE_CORRECTIONS, KL_ESTIMATORS, k1, sequence_mean_mask

OF_RATIO = ("cliprange", "cliprange_high", "cliprange_dual", "ratio_cap")
WIDEST_OF_A_MEAN = 0.1  # a mean over a response is hardly ever further from 1


def find_warnings(config: GRPOConfig) -> list[str]:
    """Return what is to be said of the objective."""
    parts = (of_updates, of_ratios_over_sequences, of_advantages, of_corrections, of_sampling)
    return [warning for part in parts for warning in part(config)]


def of_updates(config: GRPOConfig) -> list[str]:
    """Look at the importance ratio and the number of optimizer steps per rollout batch."""
    found = []
    needs, options = config.loss.needs, config.loss.options  # a plain function does not say what it needs
    if config.is_off_policy and needs and "old_log_probs" not in needs:
        found.append(
            f"several optimizer steps per rollout batch with loss_type = {config.loss_type}, which ignores that the "
            "policy has changed; grpo_clip corrects for it"
        )
    if not config.is_off_policy:
        idle = [key for key in OF_RATIO if key in needs or (key in options and config.is_changed(key))]
        idle += ["ratio_level"] if config.is_changed("ratio_level") else []
        reason = "has no effect with one optimizer step per rollout batch: the ratio is always 1"
        found += [f"{key} {reason}" for key in idle]
    if needs:
        unused = [key for key in OF_RATIO if key not in (*needs, *options)]
        found += config.without_effect(unused, f"with loss_type = {config.loss_type}")
    return found


def of_ratios_over_sequences(config: GRPOConfig) -> list[str]:
    """Look at ratios of whole responses, which stay close to 1, and at what a response then counts."""
    if not (config.has_sequence_ratios and config.is_off_policy):
        return []
    found = []
    if LENGTH_NORMALIZATIONS[config.length_normalization] is not mean_per_response:
        found.append(
            f"ratio_level = {config.ratio_level} with length_normalization = {config.length_normalization} weighs a "
            "response by its length; GSPO weighs all alike, with masked_mean"
        )
    if "cliprange" in config.loss.needs and config.cliprange > WIDEST_OF_A_MEAN:
        found.append(f"cliprange = {config.cliprange:g} clips no mean over a response: use 3e-4 or so, as GSPO does")
    if "ratio_cap" in config.loss.needs and config.ratio_cap > 1 + WIDEST_OF_A_MEAN:
        found.append(f"ratio_cap = {config.ratio_cap:g} caps no mean over a response: use 1.001 to 1.1")
    return found


def of_advantages(config: GRPOConfig) -> list[str]:
    """Look at what makes the advantages, and at losses without them."""
    found = []
    if config.group_size == 1 and not config.loss.needs:
        found.append(f"group_size = 1: every advantage is 0, and loss_type = {config.loss_type} sees raw_rewards")
    if config.loss.needs and "advantages" not in config.loss.needs:
        if config.dynamic_sampling:
            found.append(
                f"dynamic_sampling with loss_type = {config.loss_type} throws away groups that are all right, which "
                "that loss learns from"
            )
        found += config.without_effect(["use_std_normalization"], f"with loss_type = {config.loss_type}")
    if ADVANTAGE_SCALES[config.use_std_normalization] is group_mean:
        reason = f"with use_std_normalization = {config.use_std_normalization}"
        found += config.without_effect(["advantage_eps"], reason)
    if config.mask_truncated_responses and config.overlong_cache_tokens:
        found.append(
            "overlong_cache_tokens with mask_truncated_responses: the penalty of a response that is cut only raises "
            "the advantages of its group, because that response is left out; use one of the two"
        )
    return found


def of_corrections(config: GRPOConfig) -> list[str]:
    """Look at the engine correction and at the distance to the first policy."""
    found = []
    cap = config.engine_correction_cap
    if not config.is_changed("engine_correction"):
        reason = f"with engine_correction = {config.engine_correction}"
        found += config.without_effect(["engine_correction_cap"], reason)
    elif ENGINE_CORRECTIONS[config.engine_correction] is sequence_mean_mask and cap > 1 + WIDEST_OF_A_MEAN:
        found.append(f"engine_correction_cap = {cap:g} masks no mean over a response: use 1.001 to 1.1")
    if config.kl_coefficient and KL_ESTIMATORS[config.kl_estimator] is k1:
        found.append(f"kl_estimator = {config.kl_estimator} has no gradient that pulls to the first policy; use k2")
    return found


def of_sampling(config: GRPOConfig) -> list[str]:
    """Look at whether responses come from the policy that is trained."""
    found = []
    if config.rollouts_ahead and not config.is_changed("engine_correction"):
        found.append(
            "rollouts_ahead = 1 trains on responses of an older policy as if they were the present one's; "
            "engine_correction=token_truncate weighs them"
        )
    if not config.samples_from_policy:
        found.append(
            f"sampling_top_p = {config.sampling_top_p:g}: responses come from the likeliest tokens alone, which the "
            "gradient ignores; rollout/log_prob_gap is left out"
        )
    return found
