"""The mathematics of supervised fine-tuning (SFT): tokenize, mask, log-probs, entropy, loss.

Symbols: N rows of the optimizer step, B of a microbatch, T positions, V vocabulary; x the prompt, y the response; m in
{0, 1} the response mask, 1 exactly where the label is a response token.

    SFT loss  L = - (1/N) sum_b (1/C) sum_t m_bt log p(y_bt | x_b, y_b,<t)        C: normalize_constant
    per token L = - (1/M) sum_b sum_t m_bt log p(y_bt | x_b, y_b,<t)              M = sum_b sum_t m_bt

Rows are padded on the right and the attention is causal. No real position ever sees padding, so that no attention mask
is needed.

Source: Stanford CS336 (Spring 2025), Assignment 5, sections 4.2 and 4.3.
Difference: log-softmax and entropy are computed in at least float32, whatever the dtype of the logits.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:  # only the type is needed; config.py reads this module, and importing transformers takes seconds
    import transformers


def tokenize_prompt_and_output(
    prompt_strs: list[str], output_strs: list[str], tokenizer: "transformers.PreTrainedTokenizerBase"
) -> dict[str, Tensor]:
    """Tokenize prompts and outputs apart, join them, and mask the output tokens.

    The scripts train on token ids that they have already, and call its second half, `join_prompt_and_response_ids`.

    Args:
        prompt_strs: B prompts.
        output_strs: B outputs (responses); no special token is added to them.
        tokenizer: a tokenizer; without a pad token it pads with EOS (padding is masked everywhere).

    Returns:
        `input_ids` and `labels`, both (B, T - 1) int64: the joined ids without the last and without the
        first position; `response_mask`, (B, T - 1) bool: true exactly where the label is an output token.
        T is the length of the longest row.

    Raises:
        ValueError: the lists differ in length or are empty, a row has no prompt token (its first output
            token would have nothing to be predicted from), or the tokenizer has neither PAD nor EOS.

    Source: CS336 Assignment 5, problem tokenize_prompt_and_output.
    """
    if len(prompt_strs) != len(output_strs) or not prompt_strs:
        raise ValueError(
            f"prompt_strs has {len(prompt_strs)} and output_strs {len(output_strs)} strings: "
            "give as many outputs as prompts, at least one"
        )
    prompts = [encode_prompt(prompt, tokenizer) for prompt in prompt_strs]
    outputs = [encode_response(output, tokenizer) for output in output_strs]
    return join_prompt_and_response_ids(prompts, outputs, pad_token_id(tokenizer))


def encode_prompt(prompt: str, tokenizer: "transformers.PreTrainedTokenizerBase") -> list[int]:
    """Return the token ids of a prompt, with exactly one BOS where the tokenizer asks for one.

    Special tokens that a tokenizer adds at the end (EOS) are left out: the response comes next.
    """
    token_ids = encode_response(prompt, tokenizer)
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    if adds_bos and token_ids[:1] != [tokenizer.bos_token_id]:
        return [cast(int, tokenizer.bos_token_id), *token_ids]
    return token_ids


def encode_response(response: str, tokenizer: "transformers.PreTrainedTokenizerBase") -> list[int]:
    """Return the token ids of a response: its text alone, no special token added."""
    return cast(list[int], tokenizer.encode(response, add_special_tokens=False))


def join_prompt_and_response_ids(
    prompt_ids: list[list[int]], response_ids: list[list[int]], padding_id: int
) -> dict[str, Tensor]:
    """Join token ids of prompts and responses into right-padded rows; returns as above.

    >>> rows = join_prompt_and_response_ids([[5, 6], [7]], [[8], [9, 10, 11]], padding_id=0)
    >>> rows["labels"].tolist()
    [[6, 8, 0], [9, 10, 11]]
    >>> rows["response_mask"].tolist()
    [[False, True, False], [True, True, True]]
    """
    rows, masks = [], []
    for index, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        if not prompt:
            raise ValueError(f"prompt {index} has no tokens: give a prompt of at least one token")
        rows.append(torch.tensor(prompt + response))
        masks.append(torch.tensor([False] * len(prompt) + [True] * len(response)))
    padded_rows = pad_sequence(rows, batch_first=True, padding_value=padding_id)
    padded_masks = pad_sequence(masks, batch_first=True, padding_value=False)
    return {
        "input_ids": padded_rows[:, :-1].contiguous(),
        "labels": padded_rows[:, 1:].contiguous(),
        "response_mask": padded_masks[:, 1:].contiguous(),
    }


def pack_documents(documents: list[list[int]], seq_length: int) -> list[list[int]]:
    """Join documents, and cut them into rows of seq_length inputs and as many labels.

        row i = tokens[i * seq_length : (i + 1) * seq_length + 1]        its labels: the same tokens, shifted by one

    Each row has seq_length + 1 tokens, the last of which is the first of the next row. So every token but the very
    first is a label exactly once. What is left at the end and fills no row is dropped.

    Args:
        documents: token ids, each with the tokens that separate it from the next.
        seq_length: at least 1.

    Source: CS336 Assignment 5, supplement, problem data_loading.

    >>> pack_documents([[0, 1, 2], [3, 4, 5, 6, 7, 8, 9, 10]], seq_length=4)
    [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    """
    if seq_length < 1:
        raise ValueError(f"seq_length = {seq_length}: must be at least 1")
    tokens = [token for document in documents for token in document]
    return [tokens[start : start + seq_length + 1] for start in range(0, len(tokens) - seq_length, seq_length)]


def pad_token_id(tokenizer: "transformers.PreTrainedTokenizerBase") -> int:
    """Return the id to pad with: PAD, else EOS."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise ValueError("the tokenizer has neither a pad_token nor an eos_token: set tokenizer.pad_token")


def compute_entropy(logits: Float[Tensor, "... vocabulary"]) -> Float[Tensor, "..."]:
    """Return the entropy of the next-token distributions, in nats.

    The loops get the same from `get_masked_response_log_probs`, which computes it together with the log-probs.

        H(p) = - sum_v p_v log p_v,        p = softmax(logits),        0 log 0 = 0

    Args:
        logits: unnormalized log-probabilities, any float dtype; -inf means probability zero.

    Returns:
        Entropies in [0, log V], in float32 or the logits' own wider dtype.

    Source: CS336 Assignment 5, problem compute_entropy.

    >>> round(compute_entropy(torch.zeros(4)).item(), 4)
    1.3863
    """
    log_probs = _to_full_precision(logits).log_softmax(dim=-1)
    finite_log_probs = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # 0 times it is 0, where 0 * -inf is NaN
    return -(log_probs.exp() * finite_log_probs).sum(dim=-1)


def get_response_log_probs(
    model: torch.nn.Module,
    input_ids: Int[Tensor, "batch sequence"],
    labels: Int[Tensor, "batch sequence"],
    return_token_entropy: bool = False,
) -> dict[str, Tensor]:
    """Score every label of every row, prompt and padding included.

        log_probs[b, t] = log p(labels[b, t] | input_ids[b, :t + 1])

    Training takes its faster sibling, `get_masked_response_log_probs` in plainrl/log_probs.py. That one scores response
    tokens alone, and computes prefixes that rows share once. Every run compares the two before its first step.

    Args:
        model: a causal language model of Transformers.
        input_ids: (B, T) as from `tokenize_prompt_and_output`.
        labels: (B, T), input_ids shifted by one.
        return_token_entropy: also return the entropy of each next-token distribution.

    Returns:
        `log_probs` (B, T) and, where asked for, `token_entropy` (B, T) without gradient; float32 or wider.

    Source: CS336 Assignment 5, problem get_response_log_probs. It holds (B, T, V) logits in memory.
    """
    logits = _to_full_precision(model(input_ids=input_ids, use_cache=False).logits)
    scores = {"log_probs": logits.log_softmax(dim=-1).gather(-1, labels[..., None]).squeeze(-1)}
    return scores | {"token_entropy": compute_entropy(logits.detach())} if return_token_entropy else scores


def masked_normalize(
    tensor: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | Int[Tensor, "..."],
    normalize_constant: float,
    dim: int | None = None,
) -> Float[Tensor, "..."]:
    """Sum over the masked elements and divide by a constant.

        sum_i mask_i tensor_i / normalize_constant

    What stands outside the mask, NaN and infinities included, changes neither value nor gradient.

    Args:
        tensor: any shape.
        mask: same shape; nonzero elements count.
        normalize_constant: the divisor, not zero.
        dim: dimension to sum over; None sums over all.

    Source: CS336 Assignment 5, problem masked_normalize.

    >>> masked_normalize(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 0, 1]), 2.0)
    tensor(2.)
    """
    if tensor.shape != mask.shape:
        raise ValueError(f"tensor is {tuple(tensor.shape)} and mask {tuple(mask.shape)}: give both the same shape")
    if normalize_constant == 0:
        raise ValueError("normalize_constant = 0: give the number to divide by")
    kept = torch.where(mask.bool(), tensor, torch.zeros_like(tensor))
    return (kept.sum() if dim is None else kept.sum(dim=dim)) / normalize_constant


def sft_loss(
    policy_log_probs: Float[Tensor, "batch sequence"],
    response_mask: Bool[Tensor, "batch sequence"],
    normalize_constant: float,
    num_step_rows: int,
) -> Float[Tensor, ""]:
    """Return a microbatch's share of the SFT loss of an optimizer step.

        loss = - 1/N sum_b 1/C sum_t m_bt log p_bt

    The shares add up to the same loss however the rows of the step are divided into microbatches.

    Args:
        policy_log_probs: (B, T) log-probabilities of the labels, with gradient.
        response_mask: (B, T), true at response tokens.
        normalize_constant: C, not zero.
        num_step_rows: N, rows of the whole optimizer step.
    """
    per_row = masked_normalize(policy_log_probs, response_mask, normalize_constant, dim=-1)
    return -per_row.sum() / num_step_rows


class SFTStepSize(NamedTuple):
    """How large an optimizer step is, whatever its microbatches: the divisors of the length normalizations."""

    num_rows: int  # N, responses of the step
    num_tokens: int  # M, their response tokens
    normalize_constant: float  # C, not zero


class LengthNormalization(NamedTuple):
    """How the token losses of a step become one number, and whether `normalize_constant` counts in it."""

    loss: Callable[[Tensor, Tensor, SFTStepSize], Tensor]
    needs_constant: bool


# Each gives a microbatch's share of the step's loss. The shares add up to the same loss however the rows of the step
# are divided into microbatches.
LENGTH_NORMALIZATIONS: dict[str, LengthNormalization] = {
    # - 1/N sum_b 1/C sum_t m_bt log p_bt: the assignment's. The gradient grows with the length of the responses.
    "sum": LengthNormalization(
        lambda log_probs, mask, size: sft_loss(log_probs, mask, size.normalize_constant, size.num_rows),
        needs_constant=True,
    ),
    # - 1/M sum_b sum_t m_bt log p_bt: the usual cross-entropy. M counts the tokens of the whole step.
    "token_mean": LengthNormalization(
        lambda log_probs, mask, size: -masked_normalize(log_probs, mask, float(size.num_tokens)),
        needs_constant=False,
    ),
}


def sft_microbatch_train_step(
    policy_log_probs: Float[Tensor, "batch sequence"],
    response_mask: Bool[Tensor, "batch sequence"],
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[Float[Tensor, ""], dict[str, Any]]:
    """Compute the SFT loss of one microbatch and add its gradient to the parameters' `.grad`.

        loss = - 1 / (B S) sum_b sum_t m_bt log p_bt / C        S: gradient_accumulation_steps

    Over S microbatches of B rows each, the gradients add up to that of the mean over all B S rows. SFT_train.py does
    the same in `accumulate_gradients`, for microbatches of unequal size.

    Args: as in `sft_loss`.
        gradient_accumulation_steps: microbatches per optimizer step, S >= 1.

    Returns:
        The loss as differentiated (already divided by S), without gradient; and metadata:
        `sum_log_prob`, the sum over response tokens, and `num_response_tokens`, both 0-d tensors.

    Source: CS336 Assignment 5, problem sft_microbatch_train_step.
    """
    if gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps = {gradient_accumulation_steps}: must be at least 1")
    num_step_rows = len(policy_log_probs) * gradient_accumulation_steps
    loss = sft_loss(policy_log_probs, response_mask, normalize_constant, num_step_rows)
    loss.backward()
    metadata = {
        "sum_log_prob": masked_normalize(policy_log_probs.detach(), response_mask, 1.0),
        "num_response_tokens": response_mask.sum(),
    }
    return loss.detach(), metadata


def _to_full_precision(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
