"""Layers that keep less for the backward pass. Outputs stay the same, bit for bit.

Most of what a block keeps is cheap to compute again, because no matmul is needed for it:

    norm           keeps its input x and one number 1/r a token, instead of x in float32 and x/r beside it
    gated layer    keeps its two products with x, instead of their activation and product beside them

A block of width d and feed-forward width F keeps 4 F + 13 d bytes a token in 16 bits, and not 8 F + 21 d. docs/log.md
has the time and the memory that this saves. It is not done where blocks are compiled. With gradient checkpointing or
adapters the norms alone keep less.

Only layers that compute exactly what is written here are changed. Each class's own `forward` shows it, called once on
small layers.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def keep_less(model: nn.Module, in_gated_layers: bool = True) -> int:
    """Let the norms and gated layers of a model keep less for the backward pass, and return how many now do.

    Args:
        model: changed in place. Its weights and their names stay.
        in_gated_layers: whether gated layers do so, too.
    """
    num_changed = 0
    for module in model.modules():
        if _is_norm(module):
            eps = cast(float, module.variance_epsilon)
            cast(Any, module).forward = partial(_normalize, module, eps)
        elif in_gated_layers and _is_gated_layer(module):
            cast(Any, module).forward = partial(_compute_gated_layer, module)
        else:
            continue
        num_changed += 1
    return num_changed


class RMSNorm(torch.autograd.Function):
    """y = w * round(n),  where n = x / r,  and r = sqrt(mean(x^2) + eps) over the last dimension.

        dx = (g - n mean(g n)) / r,  where g = w dy        dw = sum over tokens of round(n) dy

    n and r are computed in float32, and n is rounded to the dtype of x, as Transformers' norms do. n is computed again
    for the backward pass.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = inputs.to(torch.float32)
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(inputs, weight, inverse)
        return weight * (wide * inverse).to(inputs.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, Tensor | None, None]:
        inputs, weight, inverse = ctx.saved_tensors
        gradient, of_weight = gradients[0], None
        normalized = inputs.to(torch.float32) * inverse
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * normalized.to(inputs.dtype)).flatten(0, -2).sum(0)
        of_normalized = (gradient * weight).to(torch.float32)
        along = (of_normalized * normalized).mean(-1, keepdim=True)
        of_inputs = of_normalized.sub_(normalized.mul_(along)).mul_(inverse)
        return of_inputs.to(inputs.dtype), of_weight, None


def _normalize(module: nn.Module, eps: float, hidden_states: Tensor) -> Tensor:
    return RMSNorm.apply(hidden_states, module.weight, eps)


def _compute_gated_layer(module: Any, x: Tensor) -> Tensor:
    """Return W_down (act(W_gate x) * W_up x). The activation and the product are computed again in the backward pass.

    The last matmul is not: PyTorch's checkpoint stops as soon as it has what it needs, the matmul's input.
    """

    def combine(gate: Tensor, up: Tensor) -> Tensor:
        return module.down_proj(module.act_fn(gate) * up)

    parts = (module.gate_proj(x), module.up_proj(x))
    return cast(Tensor, checkpoint(combine, *parts, use_reentrant=False, preserve_rng_state=False))


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is an RMS norm as Llama's, which neither adds to its weight nor computes otherwise."""
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    eps = cast(float, module.variance_epsilon)
    x, weight = torch.linspace(-1, 3, 24).view(3, 8), torch.linspace(-1, 2, 8)

    def agrees(x: Tensor, weight: Tensor) -> bool:
        small = SimpleNamespace(weight=weight, variance_epsilon=eps)
        return _computes(module, small, x, RMSNorm.apply(x, weight, eps))

    return agrees(x, weight) and agrees(x.bfloat16(), weight.bfloat16())


def _is_gated_layer(module: nn.Module) -> bool:
    """Return whether a module is a gated feed-forward layer as Llama's, without anything beside its three matrices."""
    activation = getattr(module, "act_fn", None)
    if not isinstance(activation, nn.Module) or any(True for _ in activation.parameters()):
        return False
    wide, narrow = torch.linspace(-1, 1, 24).view(6, 4), torch.linspace(1, -1, 24).view(4, 6)
    layers = {"gate_proj": wide, "up_proj": wide.flip(0), "down_proj": narrow}
    if not all(hasattr(module, name) for name in layers):
        return False
    linear = {name: partial(F.linear, weight=weight) for name, weight in layers.items()}
    small, x = SimpleNamespace(act_fn=activation, **linear), torch.linspace(-2, 2, 12).view(3, 4)
    return _computes(module, small, x, _compute_gated_layer(small, x))


@torch.no_grad()
def _computes(module: nn.Module, small: SimpleNamespace, x: Tensor, expected: Tensor) -> bool:
    """Return whether the forward pass of a module's class, on small layers and nothing else, gives what is expected."""
    try:
        return torch.equal(cast(Any, type(module).forward)(small, x), expected)
    except (AttributeError, TypeError):  # it needs something that the small layers do not have
        return False
