"""Compute in 16 bits with weights that are kept in float32.

Weights, gradients and moments of the policy are float32. With `compute_dtype` bfloat16 or float16, forward and backward
passes run on its working copy, a second model whose weights w' are those of the policy, rounded:

    w' = round(w)        g = sum over microbatches of dL/dw', in float32        w <- AdamW(w, g)

Most steps are too small to change a number in 16 bits. In w they add up. Between the layers numbers are 16-bit too, as
in the engine. The policy itself stays what is saved, clipped, optimized and copied into the engine.

Embedding tables are looked up in the policy's own float32 weights. The gradient of a token that occurs often is a sum
of many small numbers, of which bfloat16 would lose most (256 + 1 = 256). A tied output layer has a 16-bit copy all the
same.

Source: Micikevicius et al., Mixed Precision Training, 2018, section 3.1. There the gradient is kept in 16 bits.
"""

import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def add_working_copy(policy: PreTrainedModel, compute_dtype: str) -> None:
    """Give a policy a working copy, unless it already computes in that dtype.

    Args:
        policy: on its device, with float32 weights. A policy with adapters holds its frozen weights in the compute
            dtype, and is its own working copy.
        compute_dtype: `float32`, `bfloat16` or `float16`.
    """
    dtype = getattr(torch, compute_dtype)
    if policy.dtype == dtype:
        return
    pairs = [(weight, nn.Parameter(weight.detach().to(dtype))) for weight in policy.parameters()]
    memo = {id(master): rounded for master, rounded in pairs}
    worker = copy.deepcopy(policy, cast(Any, memo))  # takes the rounded weights, and makes no others
    for module, original in zip(worker.modules(), policy.modules(), strict=True):
        if isinstance(module, nn.Embedding):
            module.weight = cast(nn.Embedding, original).weight
            module.register_forward_hook(lambda module, inputs, output: output.to(dtype))
            if isinstance(getattr(module, "embed_scale", None), Tensor):  # Gemma's
                cast(Any, module).forward = partial(_look_up_scaled, module, dtype)
    used = {id(weight) for weight in worker.parameters()}  # an embedding's rounded table is not, unless it is tied
    pairs = [(master, rounded) for master, rounded in pairs if id(rounded) in used]
    for master, rounded in pairs:
        rounded.register_post_accumulate_grad_hook(_move_gradient_to(master))
    # Not a submodule: it must not appear among the policy's weights.
    object.__setattr__(policy, "_working_copy", (worker, pairs))


def working_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """Return the model that computes for a policy: its working copy, or the policy itself if it has none."""
    return getattr(policy, "_working_copy", (policy,))[0]


@torch.no_grad()
def refresh_working_copy(policy: PreTrainedModel) -> None:
    """Round the policy's weights again. To be called whenever they have changed."""
    _, pairs = getattr(policy, "_working_copy", (policy, []))
    for master, rounded in pairs:
        rounded.copy_(master)


def _move_gradient_to(master: nn.Parameter) -> Any:
    """Return a hook that adds a rounded weight's gradient to the policy's, in float32, and frees it."""

    def move(rounded: Tensor) -> None:
        assert rounded.grad is not None
        if master.grad is None:
            master.grad = rounded.grad.float()
        else:
            master.grad.add_(rounded.grad)
        rounded.grad = None

    return move


def _look_up_scaled(embedding: nn.Embedding, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    """Return rows of a float32 table, rounded, times the embedding's scale, rounded as a model in 16 bits has it."""
    rows = nn.functional.embedding(ids, embedding.weight, embedding.padding_idx).to(dtype)
    return rows * cast(Tensor, embedding.embed_scale).to(dtype)
