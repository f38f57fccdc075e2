"""The mathematics of supervised fine-tuning (SFT) on responses to prompts.

Symbols: B rows, T positions, V vocabulary; x the prompt, y the response; m in {0, 1} the response
mask, 1 exactly where the label is a response token.

    SFT loss  L = - (1/B) sum_b (1/C) sum_t m_bt log p(y_bt | x_b, y_b,<t)        C: normalize_constant

Source: Stanford CS336 (Spring 2025), Assignment 5, sections 4.2 and 4.3.
Differences: log-softmax and entropy are computed in at least float32 whatever the dtype of the logits;
`get_masked_response_log_probs` is added, which computes logits for response positions only, in chunks.

Rows are padded on the right and the attention is causal, so that no real position ever sees padding:
no attention mask is needed.
"""

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefix_tree import build_prefix_tree, compute_hidden_states, gather_rows, shares_prefixes

LOGIT_CHUNK_TOKENS = 2048  # 0.6 GB of bfloat16 logits at a vocabulary of 151,936
# Logits are worked on in float32 by blocks of so many numbers: 8 MB stay in a CPU's cache, a GPU wants long kernels.
CPU_BLOCK_NUMBERS, GPU_BLOCK_NUMBERS = 2**21, 2**26


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a prompt, with exactly one BOS where the tokenizer asks for one.

    Special tokens that a tokenizer adds at the end (EOS) are left out: the response comes next.
    """
    token_ids = encode_response(prompt, tokenizer)
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    if adds_bos and token_ids[:1] != [tokenizer.bos_token_id]:
        return [cast(int, tokenizer.bos_token_id), *token_ids]
    return token_ids


def encode_response(response: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a response: its text alone, no special token added."""
    return cast(list[int], tokenizer.encode(response, add_special_tokens=False))


def tokenize_prompt_and_output(
    prompt_strs: list[str], output_strs: list[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Tokenize prompts and outputs apart, join them, and mask the output tokens.

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


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: PAD, else EOS."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise ValueError("the tokenizer has neither a pad_token nor an eos_token: set tokenizer.pad_token")


def compute_entropy(logits: Float[Tensor, "... vocabulary"]) -> Float[Tensor, "..."]:
    """Return the entropy of the next-token distributions, in nats.

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

    Args:
        model: a causal language model of Transformers.
        input_ids: (B, T) as from `tokenize_prompt_and_output`.
        labels: (B, T), input_ids shifted by one.
        return_token_entropy: also return the entropy of each next-token distribution.

    Returns:
        `log_probs` (B, T) and, where asked for, `token_entropy` (B, T) without gradient; float32 or wider.

    Source: CS336 Assignment 5, problem get_response_log_probs. It holds (B, T, V) logits in memory; the
    training loops use `get_masked_response_log_probs`.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits
    return _score_labels(logits, labels, return_token_entropy)


def changes_logits(model: PreTrainedModel) -> str:
    """Return the key of a model's configuration by which it changes its logits after the output layer, or ""."""
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    return next((name for name in names if getattr(model.config, name, None) not in (None, 1, 1.0)), "")


def get_masked_response_log_probs(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch sequence"],
    labels: Int[Tensor, "batch sequence"],
    response_mask: Bool[Tensor, "batch sequence"],
    return_token_entropy: bool = False,
) -> dict[str, Tensor]:
    """Score the labels under the mask alone: equal to `get_response_log_probs` there, zero elsewhere.

    Two things make it cheaper than scoring everything, without changing a value. The hidden states of the
    masked positions are gathered before the output layer, and logits are computed for `LOGIT_CHUNK_TOKENS`
    of them at a time (again in the backward pass, if there are several chunks), so that the logits take
    chunk x V numbers instead of B x T x V. And of a model prepared by `prefix_tree.share_prefixes` every
    distinct prefix of the rows (a template, the prompt of a group) is run once, and no padding at all.

    Args:
        response_mask: (B, T), true where a score is wanted; the others are as above.

    Raises:
        ValueError: the model changes its logits after the output layer (soft-capping, scaling), which
            this shortcut would leave out.
    """
    if name := changes_logits(model):
        raise ValueError(f"model.config.{name} is set: use get_response_log_probs, which applies it")
    if shares_prefixes(model):
        tree = build_prefix_tree(input_ids, response_mask)
        mask = response_mask[:, : tree.paths.shape[1]]  # paths end with the last response token
        hidden_states = gather_rows(compute_hidden_states(model, tree), tree.paths[mask])
    else:
        outputs = model.base_model(input_ids=input_ids, use_cache=False)
        hidden_states = outputs.last_hidden_state[response_mask]
    scores = _score_in_chunks(model, hidden_states, labels[response_mask], return_token_entropy)
    return {
        name: torch.zeros(labels.shape, dtype=values.dtype, device=values.device).masked_scatter(response_mask, values)
        for name, values in scores.items()
    }


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


def scale_gradient(tensor: Float[Tensor, "..."], factor: float) -> Float[Tensor, "..."]:
    """Return the tensor as it is; what flows back through it from there on is multiplied by the factor.

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> scale_gradient(x * 3, 10.0).backward()
    >>> x.grad
    tensor(30.)
    """
    same = tensor.view_as(tensor)
    if factor != 1:
        same.register_hook(lambda gradient: gradient * factor)
    return same


def sft_microbatch_train_step(
    policy_log_probs: Float[Tensor, "batch sequence"],
    response_mask: Bool[Tensor, "batch sequence"],
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
    *,
    num_step_rows: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Any]]:
    """Compute the SFT loss of one microbatch and add its gradient to the parameters' `.grad`.

        loss = - 1 / (B G) sum_b sum_t m_bt log p_bt / C        G: gradient_accumulation_steps

    Over G microbatches of B rows each, the gradients add up to that of the mean over all B G rows.

    Args:
        policy_log_probs: (B, T) log-probabilities of the labels, with gradient.
        response_mask: (B, T), true at response tokens.
        gradient_accumulation_steps: microbatches per optimizer step, G >= 1.
        normalize_constant: C above.
        num_step_rows: rows of the whole optimizer step, where microbatches differ in size; default B G.

    Returns:
        The loss as differentiated (already divided by G), without gradient; and metadata:
        `sum_log_prob`, the sum over response tokens, and `num_response_tokens`, both 0-d tensors.

    Source: CS336 Assignment 5, problem sft_microbatch_train_step.
    """
    if gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps = {gradient_accumulation_steps}: must be at least 1")
    per_row = masked_normalize(policy_log_probs, response_mask, normalize_constant, dim=-1)
    if num_step_rows is None:
        num_step_rows = len(policy_log_probs) * gradient_accumulation_steps
    scaled_loss = -per_row.sum() / num_step_rows
    scaled_loss.backward()
    metadata = {
        "sum_log_prob": masked_normalize(policy_log_probs.detach(), response_mask, 1.0),
        "num_response_tokens": response_mask.sum(),
    }
    return scaled_loss.detach(), metadata


def _score_in_chunks(
    model: PreTrainedModel,
    hidden_states: Float[Tensor, "tokens width"],
    labels: Int[Tensor, " tokens"],
    return_token_entropy: bool,
) -> dict[str, Tensor]:
    """Score hidden states chunk by chunk; of several chunks none keeps its logits for the backward pass."""
    output_layer = cast(torch.nn.Module, model.get_output_embeddings())

    def score(hidden_chunk: Tensor, label_chunk: Tensor) -> dict[str, Tensor]:
        return _score_labels(output_layer(hidden_chunk), label_chunk, return_token_entropy)

    if len(labels) <= LOGIT_CHUNK_TOKENS:
        return score(hidden_states, labels)
    chunks = [
        cast(dict[str, Tensor], checkpoint(score, hidden_chunk, label_chunk, use_reentrant=False))
        for hidden_chunk, label_chunk in zip(
            hidden_states.split(LOGIT_CHUNK_TOKENS), labels.split(LOGIT_CHUNK_TOKENS), strict=True
        )
    ]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _score_labels(
    logits: Float[Tensor, "... vocabulary"], labels: Int[Tensor, "..."], return_token_entropy: bool
) -> dict[str, Tensor]:
    log_probs, entropies = _LabelScores.apply(logits.flatten(0, -2), labels.flatten())
    scores = {"log_probs": log_probs.view(labels.shape)}
    return scores | {"token_entropy": entropies.view(labels.shape)} if return_token_entropy else scores


class _LabelScores(torch.autograd.Function):
    """The labels' log-probabilities, and the entropies without gradient, of logits in any dtype.

        log p_y = z_y - s,      s = log sum_v exp z_v,      d log p_y / d z_v = [v = y] - p_v
        H = s - sum_v p_v z_v

    Both come out of one exponential, in at least float32, block by block: no tensor of the logits' size is made but
    their gradient, in their own dtype.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        size = _block_size(logits)
        results = []
        for block, label in zip(logits.split(size), labels[:, None].split(size), strict=True):
            shifted = _to_full_precision(block)
            highest = shifted.amax(dim=-1, keepdim=True)
            shifted = shifted - highest
            label_logit = shifted.gather(-1, label).squeeze(-1)
            exponentials = shifted.exp()
            total = exponentials.sum(dim=-1)
            # 0 times the lowest number is 0, where 0 * -inf is NaN
            shifted.clamp_(min=torch.finfo(shifted.dtype).min)
            entropy = total.log() - exponentials.mul_(shifted).sum(dim=-1) / total  # no product autocast would round
            results.append((label_logit - total.log(), entropy, highest.squeeze(-1) + total.log()))
        log_probs, entropies, normalizers = (torch.cat(parts) for parts in zip(*results, strict=True))
        ctx.save_for_backward(logits, labels, normalizers)
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, None]:
        logits, labels, normalizers = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        size = _block_size(logits)
        columns = (labels[:, None], normalizers[:, None], gradients[0][:, None])
        for block, output, label, normalizer, weight in zip(
            logits.split(size), gradient.split(size), *(column.split(size) for column in columns), strict=True
        ):
            part = (_to_full_precision(block) - normalizer).exp_().mul_(-weight)
            output.copy_(part.scatter_add_(-1, label, weight))
        return gradient, None


def _block_size(logits: Float[Tensor, "tokens vocabulary"]) -> int:
    """Return how many rows of logits are worked on at a time."""
    return max(1, (CPU_BLOCK_NUMBERS if logits.device.type == "cpu" else GPU_BLOCK_NUMBERS) // logits.shape[-1])


def _to_full_precision(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
