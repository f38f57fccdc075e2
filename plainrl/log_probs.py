"""Log-probabilities of response tokens. The values equal `SFT_helper.get_response_log_probs`, in less time and memory.

Symbols: B rows, T positions, V vocabulary.
"""

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from plainrl.prefix_tree import PrefixTree, build_prefix_tree, compute_hidden_states, gather_rows, shares_prefixes

LOGIT_CHUNK_TOKENS = 2048  # 0.6 GB of bfloat16 logits at a vocabulary of 151,936
# Logits are processed in float32, in blocks of so many numbers. 8 MB stay in a CPU's cache. A GPU prefers long kernels.
CPU_BLOCK_NUMBERS, GPU_BLOCK_NUMBERS = 2**21, 2**26


def get_masked_response_log_probs(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch sequence"],
    labels: Int[Tensor, "batch sequence"],
    response_mask: Bool[Tensor, "batch sequence"],
    return_token_entropy: bool = False,
    prefix_tree: PrefixTree | None = None,
) -> dict[str, Tensor]:
    """Score only the labels under the mask. Scores equal `get_response_log_probs` there and are zero elsewhere.

        log p(y_t | x, y_<t) = log softmax(z_t)[y_t]

    Two savings make it cheaper than scoring all positions, and neither changes a value.

    - The hidden states under the mask are gathered before the output layer. Logits are computed for
      `LOGIT_CHUNK_TOKENS` of them at a time, so that they take chunk x V numbers instead of B x T x V. If there are
      several chunks, the backward pass computes their logits again.
    - If `prefix_tree.share_prefixes` has prepared the model, every distinct prefix of the rows (a template, the prompt
      of a group) is computed once. Padding is not computed at all.

    Args:
        model: the policy.
        input_ids: (B, T), token ids.
        labels: (B, T), the token that follows each position.
        response_mask: (B, T), true where a score is needed.
        return_token_entropy: whether the entropies are returned, too.
        prefix_tree: the tree of these rows for a model that shares prefixes. None: it is built here.

    Returns:
        `log_probs` and, if asked for, `token_entropy`: (B, T), in nats. The entropies carry no gradient.

    Raises:
        ValueError: the model changes its logits after the output layer (soft-capping, scaling). This shortcut would
            leave that out.
    """
    if name := changes_logits(model):
        raise ValueError(f"model.config.{name} is set: use get_response_log_probs, which applies it")
    if shares_prefixes(model):
        tree = prefix_tree or build_prefix_tree(input_ids, response_mask)
        hidden_states = gather_rows(compute_hidden_states(model, tree), tree.scored_nodes)
        scored_labels = labels.flatten()[tree.scored]
    else:
        outputs = model.base_model(input_ids=input_ids, use_cache=False)
        hidden_states, scored_labels = outputs.last_hidden_state[response_mask], labels[response_mask]
    scores = _score_in_chunks(model, hidden_states, scored_labels, return_token_entropy)
    return {
        name: torch.zeros(labels.shape, dtype=values.dtype, device=values.device).masked_scatter(response_mask, values)
        for name, values in scores.items()
    }


def changes_logits(model: PreTrainedModel) -> str:
    """Return the key of a model's configuration that changes logits after the output layer, or "" if none does."""
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    return next((name for name in names if getattr(model.config, name, None) not in (None, 1, 1.0)), "")


def _score_in_chunks(
    model: PreTrainedModel,
    hidden_states: Float[Tensor, "tokens width"],
    labels: Int[Tensor, " tokens"],
    return_token_entropy: bool,
) -> dict[str, Tensor]:
    """Score hidden states chunk by chunk. If there are several chunks, none keeps its logits for the backward pass."""
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
    """Return the labels' log-probabilities and, without gradient, the entropies, from logits z in any dtype.

        log p_y = z_y - s,      s = log sum_v exp z_v,      d log p_y / d z_v = [v = y] - p_v
        H = s - sum_v p_v z_v

    Both use the same exponentials, computed block by block in at least float32. The only tensor of the logits' size is
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
            # 0 times the lowest finite number is 0, but 0 * -inf would be NaN.
            shifted.clamp_(min=torch.finfo(shifted.dtype).min)
            # An elementwise product and a sum, because autocast would round a matmul.
            entropy = total.log() - exponentials.mul_(shifted).sum(dim=-1) / total
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
    """Return how many rows of logits form a block."""
    return max(1, (CPU_BLOCK_NUMBERS if logits.device.type == "cpu" else GPU_BLOCK_NUMBERS) // logits.shape[-1])


def _to_full_precision(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
