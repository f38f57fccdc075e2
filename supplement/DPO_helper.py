"""The mathematics of direct preference optimization (DPO): log-probs of responses, the loss.

Symbols: x the prompt, y_w the chosen response (w: won), y_l the rejected one (l: lost), pi the policy, pi_ref the
reference: the policy before training; beta how strongly the policy is held to it.

    log pi(y|x) = sum_t log pi(y_t | x, y_<t)
    r(y)        = beta (log pi(y|x) - log pi_ref(y|x))          implicit reward, up to a term of x alone
    L           = - log sigma(r(y_w) - r(y_l))                  log 2 where pi = pi_ref

Source: Rafailov et al., Direct Preference Optimization, 2023, equation 7. Stanford CS336 (Spring 2025), supplement of
Assignment 5, section 5.
Difference: the handout's observation that the prompt's log-probs cancel is not needed. Only responses are scored.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from SFT_helper import encode_prompt, encode_response, get_response_log_probs, join_prompt_and_response_ids

if TYPE_CHECKING:
    import transformers

# The Alpaca template without its response: it ends in the newline that the response follows.
ALPACA_PROMPT = (Path(__file__).parent.parent / "plainrl/prompts/alpaca.prompt").read_text()


def fill_alpaca(instruction: str) -> str:
    r"""Return the prompt that puts an instruction into the Alpaca template. The response follows it directly.

    >>> fill_alpaca("Add 1 and 2.").splitlines()[-4:]
    ['### Instruction:', 'Add 1 and 2.', '', '### Response:']
    """
    return ALPACA_PROMPT.replace("{question}", instruction)


def compute_per_instance_dpo_loss(
    lm: torch.nn.Module,
    lm_ref: torch.nn.Module,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    beta: float,
    prompt: str,
    response_chosen: str,
    response_rejected: str,
) -> Float[Tensor, ""]:
    """Return the DPO loss of one pair of responses, in the Alpaca template, each with EOS at its end.

        L = - log sigma(beta (log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l)))

    Args:
        lm: the policy pi, which gets a gradient.
        lm_ref: the reference pi_ref, which gets none. It may be on another device.
        tokenizer: of both. It needs an EOS token.
        beta: the factor of the implicit rewards, above 0; 0.1 is usual.
        prompt: the instruction alone.
        response_chosen: y_w.
        response_rejected: y_l.

    Returns:
        The loss, a 0-d tensor on the policy's device.

    Source: the supplement's problem dpo_loss.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, which ends a response: set tokenizer.eos_token")
    prompt_ids = encode_prompt(fill_alpaca(prompt), tokenizer)
    end = cast(int, tokenizer.eos_token_id)
    responses = [[*encode_response(text, tokenizer), end] for text in (response_chosen, response_rejected)]
    policy = score_pair(lm, prompt_ids, responses)
    with torch.no_grad():
        reference = score_pair(lm_ref, prompt_ids, responses).to(policy.device)
    losses, _ = compute_dpo_loss(policy[:1], policy[1:], reference[:1], reference[1:], beta)
    return losses[0]


def score_pair(model: torch.nn.Module, prompt_ids: list[int], response_ids: list[list[int]]) -> Float[Tensor, "rows"]:
    """Return log pi(y|x) of each response to a prompt, in nats. Training has a faster way to the same values.

    Args:
        model: a causal language model of Transformers.
        prompt_ids: x, at least one token.
        response_ids: the responses y.
    """
    rows = join_prompt_and_response_ids([prompt_ids] * len(response_ids), response_ids, padding_id=0)
    rows = {name: tensor.to(next(model.parameters()).device) for name, tensor in rows.items()}
    log_probs = get_response_log_probs(model, rows["input_ids"], rows["labels"])["log_probs"]
    return torch.where(rows["response_mask"], log_probs, torch.zeros_like(log_probs)).sum(dim=-1)


def compute_dpo_loss(
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
) -> tuple[Float[Tensor, " pairs"], dict[str, Float[Tensor, " pairs"]]]:
    """Return the DPO loss of each pair from the log-probs of its responses.

        L_i = - log sigma(r_i(y_w) - r_i(y_l)),      r(y) = beta (log pi(y|x) - log pi_ref(y|x))
        dL_i / d log pi(y_w) = - beta sigma(r_i(y_l) - r_i(y_w)) = - dL_i / d log pi(y_l)

    Args:
        policy_chosen, policy_rejected: log pi(y_w|x) and log pi(y_l|x), sums over the response tokens, in nats.
        reference_chosen, reference_rejected: the same of pi_ref. They get no gradient.
        beta: above 0.

    Returns:
        The losses; and metadata without gradient, each one number per pair: `chosen_reward`, `rejected_reward`,
        `margin` (their difference), `accuracy` (1 where log pi(y_w|x) > log pi(y_l|x), the handout's) and
        `reward_accuracy` (1 where the margin is above 0).

    Source: Rafailov et al. 2023, equation 7.

    >>> zeros = torch.zeros(2)
    >>> losses, metadata = compute_dpo_loss(torch.tensor([0.0, 10.0]), zeros, zeros, zeros, beta=0.1)
    >>> [round(value, 4) for value in losses.tolist()], metadata["margin"].tolist()
    ([0.6931, 0.3133], [0.0, 1.0])
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta = {beta}: must be above 0, as 0.1")
    chosen_reward = beta * (policy_chosen - reference_chosen.detach())
    rejected_reward = beta * (policy_rejected - reference_rejected.detach())
    margin = chosen_reward - rejected_reward
    metadata = {
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": margin,
        "accuracy": (policy_chosen > policy_rejected).to(margin.dtype),
        "reward_accuracy": (margin > 0).to(margin.dtype),
    }
    return -F.logsigmoid(margin), {name: values.detach() for name, values in metadata.items()}
