"""The optimizers by name: how each is made, and how many numbers it keeps for each trained weight."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:  # the schema reads this table
    from plainrl.shared_config import TrainConfig

ParameterGroups = list[dict[str, Any]]


class OptimizerKind(NamedTuple):
    """How an optimizer is made from groups of parameters, and its moments: float32 numbers for each weight."""

    make: Callable[[ParameterGroups, "TrainConfig"], torch.optim.Optimizer]
    num_moments: int


def make_adamw(groups: ParameterGroups, config: "TrainConfig") -> torch.optim.Optimizer:
    """Return AdamW with the configured betas and weight decay.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
    """
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.adam_betas, weight_decay=config.weight_decay, fused=True
    )


def make_rmsprop(groups: ParameterGroups, config: "TrainConfig") -> torch.optim.Optimizer:
    """Return RMSprop with PyTorch's constants (alpha 0.99, eps 1e-8). It has half of AdamW's moments.

    Its weight decay is added to the gradient, as in L2 regularization.

    Source: Rafailov et al., Direct Preference Optimization, 2023, appendix B; Stanford CS336 (Spring 2025), supplement
    of Assignment 5, section 5.4.
    """
    # One tensor at a time: all at once would take another copy of the weights on a GPU.
    return torch.optim.RMSprop(groups, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=False)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(make_adamw, num_moments=2),
    "rmsprop": OptimizerKind(make_rmsprop, num_moments=1),
}
