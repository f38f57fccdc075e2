"""Find what needs attention in the metrics of a GRPO step, and say it in one sentence each."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from plainrl.config import GRPOConfig


def diagnose(step: int, rows: Sequence[Mapping[str, Any]], config: GRPOConfig) -> None:
    """Print the remarks on a step above the progress bar."""
    for row in rows:
        for remark in find_remarks(row, config):
            tqdm.write(f"step {step}: {remark}", file=sys.stdout)


def find_remarks(metrics: Mapping[str, Any], config: GRPOConfig) -> list[str]:
    """Return one sentence for each thing in the metrics of an optimizer step that needs attention."""

    def value(name: str) -> float:
        number = metrics.get(name)
        return 0.0 if number is None else float(number)

    remarks = []
    if metrics.get("rollout/all_wrong_fraction") == 1:
        if value("rollout/truncated_fraction") == 1:
            remarks.append("every reward is zero and every response was cut: raise sampling_max_tokens")
        elif value("rollout/format_reward") == 0:
            remarks.append("every reward is zero and no response keeps the format: start from a policy that knows it")
        else:
            remarks.append("every reward is zero although the format is kept: the questions are too hard, or misgraded")
    elif value("rollout/zero_advantage_fraction") == 1 and config.loss.zero_with and "advantages" in config.loss.needs:
        remarks.append("every advantage is zero: each group is all right or all wrong, so nothing is learnt")
    if value("train/clip_fraction_low") + value("train/clip_fraction_high") > 0.3 and not config.has_sequence_ratios:
        advice = "lower learning_rate, or take fewer optimizer steps on a batch"
        remarks.append(f"over 30 % of the tokens are clipped: {advice}")  # GSPO clips more by design
    if value("train/grad_norm") > 100 * config.max_grad_norm:
        remarks.append("the gradient norm is over 100 times max_grad_norm: lower learning_rate, look at the ratio")
    return remarks
