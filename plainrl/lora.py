"""Low-rank adapters (LoRA): train two small matrices beside each linear layer, and leave the layer as it is.

    y = W x + (alpha / r) B A x = W' x        W: (out, in), frozen    A: (r, in)    B: (out, r)

Every linear layer of the policy's blocks gets a pair A, B. Only these have gradients and moments, in float32. A starts
uniform in +-1/sqrt(in), and B starts at zero, so that step 0 is the model itself, if that was published in 16 bits.

Nothing else of the policy is trained. It is held in the compute dtype alone. A model in float32, such as the result of
another stage, is thereby rounded once, also in its checkpoints.

The engine gets W', rounded to its own dtype. The policy computes with W' too, rounded in the same way, so that both
are one model in 16 bits as well. With W x and B A x apart, steps of less than a rounding error would move the policy
but not the engine. Forming W' takes r multiplications for each weight, little beside one for each weight and token.

`model/` of a checkpoint is the plain model with the weights W'. The sum cannot be taken apart again exactly. A
checkpoint therefore also holds A and B in `adapters.safetensors`, with a hash of the frozen weights. A resumed run
loads the frozen weights from its first model.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, equation 3. The start of A is that of the
authors' code. All linear layers are adapted, and not the attention's alone, as Schulman et al. (LoRA Without Regret,
2025) advise.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from plainrl.distributed import whole
from plainrl.records import UserError

if TYPE_CHECKING:  # only the types are needed: a table of runs should not wait for the import
    from transformers import PreTrainedModel

    from plainrl.config import TrainConfig

ADAPTERS = "adapters.safetensors"


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter. `weight` and `bias` keep their names.

    Args:
        layer: the layer.
        rank: r, width of the adapter.
        alpha: the adapter counts alpha / r times.
        generator: draws A.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight, self.rank, self.alpha = layer.weight, rank, alpha
        self.register_parameter("bias", layer.bias)
        self.lora_a = nn.Parameter(torch.empty(rank, layer.in_features, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.zeros(layer.out_features, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5), generator=generator)  # +-1/sqrt(in)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return W' x + bias, computed in the dtype of W."""
        return _MergedLinear.apply(inputs, self.weight, self.bias, self.lora_a, self.lora_b, self.alpha / self.rank)

    def merged_weight(self) -> Tensor:
        """Return W' = W + (alpha / r) B A, in the dtype of A and B."""
        return _merge(self.weight, self.lora_a, self.lora_b, self.alpha / self.rank)


class _MergedLinear(torch.autograd.Function):
    """y = W' x + b, where W' is rounded to the dtype of W. Its gradient is that without the rounding, and has rank r.

        dA = s (B^T dy) x^T,    dB = s dy (A x)^T,    dx = W'^T dy            s = alpha / r

    W' is formed again for the backward pass, so that no second model is kept. Neither is a gradient of its size made.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, lora_a, lora_b)
        ctx.scale = scale
        return F.linear(inputs, _merge(weight, lora_a, lora_b, scale).to(weight.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        inputs, weight, lora_a, lora_b = ctx.saved_tensors
        gradient, rows = gradients[0].flatten(0, -2), inputs.flatten(0, -2)
        of_a = (gradient @ lora_b.to(weight.dtype)).T @ rows
        of_b = gradient.T @ (rows @ lora_a.to(weight.dtype).T)
        of_inputs = None
        if ctx.needs_input_grad[0]:
            of_inputs = gradients[0] @ _merge(weight, lora_a, lora_b, ctx.scale).to(weight.dtype)
        scaled = (ctx.scale * part.to(lora_a.dtype) for part in (of_a, of_b))
        return of_inputs, None, None, *scaled, None


def _merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Return W + s B A, in the dtype of A and B."""
    return weight.to(lora_a.dtype, copy=True).addmm_(lora_b, lora_a, alpha=scale)  # in place: no third such matrix


def add_adapters(policy: "PreTrainedModel", config: "TrainConfig") -> None:
    """Freeze a policy, round it to the compute dtype, and put an adapter beside each linear layer.

    Args:
        policy: with float32 weights. It is changed in place.
        config: `lora_rank`, `lora_alpha`, `compute_dtype`, and the `seed` that alone determines A.

    Raises:
        UserError: there is no linear layer of torch in its blocks.
    """
    blocks = cast(nn.Module, policy.base_model)
    linear_layers = [
        (parent, name, layer)
        for parent in blocks.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
    ]
    if not linear_layers:
        raise UserError(
            f"lora_rank = {config.lora_rank}: {type(policy).__name__} has no torch.nn.Linear in its blocks (GPT-2's "
            "layers are of another kind); use lora_rank=0 or another model"
        )
    dtype = getattr(torch, config.compute_dtype)
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    generator = torch.Generator().manual_seed(config.seed)
    for parent, name, layer in linear_layers:
        setattr(parent, name, LoRALinear(layer, config.lora_rank, config.lora_alpha, generator))


def adapted_layers(policy: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers with an adapter, by name. There are none if all weights are trained."""
    return {name: module for name, module in policy.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def merged_state_dict(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each weight of the plain model that the policy computes.

    Without adapters this is `policy.state_dict()`. With adapters each sum is made when its turn comes, in float32, so
    that no second model is in memory. The names are the model's own.
    """
    layers = adapted_layers(policy)
    for name, tensor in policy.state_dict().items():
        layer_name, _, kind = name.rpartition(".")
        if layer_name in layers and kind in ("lora_a", "lora_b"):
            continue
        if layer_name in layers and kind == "weight":
            yield name, layers[layer_name].merged_weight()
        else:
            yield name, tensor


def merged_model(policy: "PreTrainedModel") -> "PreTrainedModel":
    """Return the plain model that the policy computes, to be saved: on the CPU, in float32.

    Without adapters this is the policy itself.
    """
    if not adapted_layers(policy):
        return policy
    with torch.device("meta"):
        model = type(policy)(cast(Any, policy.config))
    weights = ((name, tensor.cpu()) for name, tensor in merged_state_dict(policy))
    model.load_state_dict({n: w.float() if w.is_floating_point() else w for n, w in weights}, assign=True)
    model.tie_weights()
    model.generation_config = policy.generation_config
    return model


def save_adapters(policy: nn.Module, folder: Path) -> None:
    """Write A and B of each layer into a checkpoint's folder, and what they belong to. Without adapters do nothing."""
    if adapted_layers(policy):
        trained = {name: part.detach().contiguous() for name, part in policy.named_parameters() if part.requires_grad}
        belongs_to = {"settings": _settings_of(policy), "frozen_sha256": fingerprint_frozen(policy)}
        # One entry, because safetensors writes several in a random order. Equal states give equal files.
        save_file(trained, folder / ADAPTERS, {"belongs_to": json.dumps(belongs_to)})


def load_adapters(policy: nn.Module, checkpoint: Path) -> None:
    """Load the adapters that a checkpoint holds into a policy with adapters. If neither has any, do nothing.

    Raises:
        UserError: the checkpoint's adapters do not fit the policy: one of the two has none, or rank, alpha or the
            frozen weights differ.
    """
    tensors, belongs_to = {}, {"settings": _settings_of(None)}
    if (path := checkpoint / ADAPTERS).is_file():
        with safe_open(path, "pt") as file:
            belongs_to = json.loads(file.metadata()["belongs_to"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    new_run = f"or start a new run with model={checkpoint / 'model'}"
    if (saved := belongs_to["settings"]) != (asked := _settings_of(policy)):
        raise UserError(f"{asked}: {checkpoint} was made with {saved}; go on with these settings, {new_run}")
    if tensors and belongs_to["frozen_sha256"] != fingerprint_frozen(policy):
        raise UserError(
            f"{path} was trained beside other frozen weights than model and compute_dtype name now; name those of the "
            f"run, {new_run}"
        )
    policy.load_state_dict(tensors, strict=False)


def fingerprint_frozen(policy: nn.Module) -> str:
    """Return a SHA-256 of the frozen weights. All ranks have to call it."""
    return fingerprint_weights((name, one) for name, one in policy.named_parameters() if not one.requires_grad)


def fingerprint_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 of weights, as they are held: names, dtypes and values. All ranks have to call it."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {weight.dtype} ".encode())
        digest.update(cast(Any, whole(weight.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _settings_of(policy: nn.Module | None) -> str:
    """Return the settings of a policy's adapters, as they stand on a command line."""
    for layer in adapted_layers(policy).values() if policy else ():
        return f"lora_rank={layer.rank} lora_alpha={layer.alpha:g}"
    return "lora_rank=0"
