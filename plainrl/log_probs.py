"""Log-probabilities of response tokens. The values equal `SFT_helper.get_response_log_probs`, in less time and memory.

Symbols: B rows, T positions, V vocabulary.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from plainrl.distributed import call_with_weights
from plainrl.prefix_tree import PrefixTree, build_prefix_tree, compute_hidden_states, gather_rows, shares_prefixes
from plainrl.records import UserError

LOGIT_CHUNK_TOKENS = 2048  # 0.6 GB of bfloat16 logits at a vocabulary of 151,936
# Logits are processed in float32, in blocks of so many numbers. 8 MB stay in a CPU's cache. A GPU prefers long kernels.
CPU_BLOCK_NUMBERS, GPU_BLOCK_NUMBERS = 2**21, 2**26
COMPILED = "_scores_are_compiled"  # attribute of a model


def get_masked_response_log_probs(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch sequence"],
    labels: Int[Tensor, "batch sequence"],
    response_mask: Bool[Tensor, "batch sequence"],
    return_token_entropy: bool = False,
    prefix_tree: PrefixTree | None = None,
    *,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Score only the labels under the mask. Scores equal `get_response_log_probs` there and are zero elsewhere.

        log p(y_t | x, y_<t) = log softmax(z_t / temperature)[y_t]

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
        temperature: that of the sampling, so that the scores are those of the distribution that was sampled. 1 is the
            model's own.

    Returns:
        `log_probs` and, if asked for, `token_entropy`: (B, T), in nats. Both carry a gradient, which costs nothing
        unless it is used. An entropy is that of the whole distribution at `temperature`.

    Raises:
        ValueError: the model changes its logits after the output layer (soft-capping, scaling). This shortcut would
            leave that out.
    """
    if name := changes_logits(model):
        raise ValueError(f"model.config.{name} is set: use get_response_log_probs, which applies it")
    rows = (input_ids, labels, response_mask, prefix_tree)
    return call_with_weights(model, _score_masked, *rows, return_token_entropy, temperature)


def _score_masked(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    response_mask: Tensor,
    prefix_tree: PrefixTree | None,
    return_token_entropy: bool,
    temperature: float,
) -> dict[str, Tensor]:
    if shares_prefixes(model):
        tree = prefix_tree or build_prefix_tree(input_ids, response_mask)
        scored, hidden_states = tree.scored, gather_rows(compute_hidden_states(model, tree), tree.scored_nodes)
    else:
        outputs = model.base_model(input_ids=input_ids, use_cache=False)
        scored, hidden_states = response_mask.flatten().nonzero()[:, 0], outputs.last_hidden_state[response_mask]
    scored_labels = labels.flatten()[scored]
    scores = _score_in_chunks(model, hidden_states, scored_labels, return_token_entropy, temperature)
    # By places, because on a GPU the backward pass of a scatter by a mask would wait for the forward pass.
    return {
        name: values.new_zeros(labels.numel()).index_copy(0, scored, values).view(labels.shape)
        for name, values in scores.items()
    }


def compile_scores(model: PreTrainedModel) -> None:
    """Let the log-probs and entropies of a model be computed by compiled code, from its logits on."""
    setattr(model, COMPILED, True)


def compute_output_in_float32(model: PreTrainedModel) -> None:
    """Let the model compute its output layer in float32, from weights in 16 bits too. Names and weights stay.

    In bfloat16 logits between 16 and 32 would be rounded to multiples of 1/8. vLLM's head_dtype=float32 spares the
    engine that rounding.

    Raises:
        UserError: the output layer is no plain linear layer.

    Source: MiniMax-M1, 2025, section 3.2, and ScaleRL, 2025, section 3.
    """
    layer = cast(Any, model.get_output_embeddings())
    if type(layer) is not torch.nn.Linear:
        raise UserError(
            f"float32_output_layer = true: the output layer of {model.config.model_type} is a {type(layer).__name__}, "
            "no torch.nn.Linear; leave it out"
        )
    cast(Any, layer).forward = partial(_linear_in_float32, layer)


def _linear_in_float32(layer: torch.nn.Linear, inputs: Tensor) -> Tensor:
    return F.linear(inputs.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())


def changes_logits(model: PreTrainedModel) -> str:
    """Return the key of a model's configuration that changes logits after the output layer, or "" if none does."""
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    return next((name for name in names if getattr(model.config, name, None) not in (None, 1, 1.0)), "")


def _score_in_chunks(
    model: PreTrainedModel,
    hidden_states: Float[Tensor, "tokens width"],
    labels: Int[Tensor, " tokens"],
    return_token_entropy: bool,
    temperature: float,
) -> dict[str, Tensor]:
    """Score hidden states chunk by chunk. If there are several chunks, none keeps its logits for the backward pass."""
    output_layer = cast(torch.nn.Module, model.get_output_embeddings())
    is_compiled = getattr(model, COMPILED, False)

    def score(hidden_chunk: Tensor, label_chunk: Tensor) -> dict[str, Tensor]:
        return _score_labels(output_layer(hidden_chunk), label_chunk, return_token_entropy, temperature, is_compiled)

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
    logits: Float[Tensor, "... vocabulary"],
    labels: Int[Tensor, "..."],
    return_token_entropy: bool,
    temperature: float = 1.0,
    is_compiled: bool = False,
) -> dict[str, Tensor]:
    log_probs, entropies = _LabelScores.apply(logits.flatten(0, -2), labels.flatten(), temperature, is_compiled)
    scores = {"log_probs": log_probs.view(labels.shape)}
    return scores | {"token_entropy": entropies.view(labels.shape)} if return_token_entropy else scores


class _LabelScores(torch.autograd.Function):
    """Return the labels' log-probabilities and the entropies from logits T z in any dtype, at temperature T.

        log p_y = z_y - s,      s = log sum_v exp z_v,      d log p_y / d z_v = [v = y] - p_v
        H = s - sum_v p_v z_v,                              d H / d z_v       = - p_v (log p_v + H)

    Both use the same exponentials, computed block by block in at least float32; compiled, in one pass. The only tensor
    of the logits' size is their gradient, in their own dtype. The entropy's part of it is computed only where the loss
    contains the entropy.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: float, is_compiled: bool
    ) -> tuple[Tensor, Tensor]:
        if is_compiled:
            log_probs, entropies, normalizers = _compiled(_score_block)(logits, labels[:, None], temperature)
        else:
            size = _block_size(logits)
            blocks = zip(logits.split(size), labels[:, None].split(size), strict=True)
            results = [_score_block(block, label, temperature) for block, label in blocks]
            log_probs, entropies, normalizers = (torch.cat(parts) for parts in zip(*results, strict=True))
        ctx.save_for_backward(logits, labels, normalizers, entropies)
        ctx.temperature, ctx.is_compiled = temperature, is_compiled
        ctx.set_materialize_grads(False)  # None, and not zeros, for what the loss does not contain
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits, labels, normalizers, entropies = ctx.saved_tensors
        # What the loss does not contain has no gradient. By the chain rule, what it contains is divided by T.
        of_log_probs, of_entropies = (
            part if part is None or ctx.temperature == 1 else part / ctx.temperature for part in gradients
        )
        if of_log_probs is None:
            of_log_probs = torch.zeros_like(normalizers)
        columns = (labels, normalizers, entropies, of_log_probs, of_entropies)
        differentiate: Any = _compiled(_differentiate_block) if ctx.is_compiled else _differentiate_block
        if ctx.is_compiled:
            parts = (None if column is None else column[:, None] for column in columns)
            return differentiate(logits, *parts, ctx.temperature), None, None, None
        result, size = torch.empty_like(logits), _block_size(logits)
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            parts = (None if column is None else column[rows, None] for column in columns)
            result[rows] = differentiate(logits[rows], *parts, ctx.temperature)
        return result, None, None, None


def _score_block(block: Tensor, label: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs, entropies and log-normalizers of a block of logits."""
    shifted = _at_temperature(block, temperature)
    highest = shifted.amax(dim=-1, keepdim=True)
    shifted = shifted - highest
    label_logit = shifted.gather(-1, label).squeeze(-1)
    exponentials = shifted.exp()
    total = exponentials.sum(dim=-1)
    # 0 times the lowest finite number is 0, but 0 * -inf would be NaN.
    shifted.clamp_(min=torch.finfo(shifted.dtype).min)
    # An elementwise product and a sum, because autocast would round a matmul.
    entropy = total.log() - exponentials.mul_(shifted).sum(dim=-1) / total
    return label_logit - total.log(), entropy, highest.squeeze(-1) + total.log()


def _differentiate_block(
    block: Tensor,
    label: Tensor,
    normalizer: Tensor,
    entropy: Tensor,
    weight: Tensor,
    of_entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """Return the gradient of a block of logits, from those of its log-probs (`weight`) and of its entropies."""
    part = _at_temperature(block, temperature) - normalizer  # log p
    factor = -weight
    if of_entropy is not None:
        finite = part.clamp(min=torch.finfo(part.dtype).min)  # 0 * -inf would be NaN
        factor = finite.add_(entropy).mul_(of_entropy).neg_().sub_(weight)
    part = part.exp_().mul_(factor)
    if torch.compiler.is_compiling():  # a scatter, and rounding, would be passes of their own
        is_label = torch.arange(block.shape[-1], device=block.device) == label
        return torch.where(is_label, part + weight, part).to(block.dtype)
    return part.scatter_add_(-1, label, weight)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled: one pass over the logits instead of one for each operation."""
    return torch.compile(function, dynamic=True)


def _block_size(logits: Float[Tensor, "tokens vocabulary"]) -> int:
    """Return how many rows of logits form a block."""
    return max(1, (CPU_BLOCK_NUMBERS if logits.device.type == "cpu" else GPU_BLOCK_NUMBERS) // logits.shape[-1])


def _at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Return logits divided by the temperature, in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature
