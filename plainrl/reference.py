"""The run's first policy, from which the KL term measures: it scores each rollout batch once.

There is no second model on the device. A copy of the first trained weights stays in the CPU's memory, 4 bytes for each.
To score, the policy and the copy exchange their weights, and afterwards exchange them again. No bit is lost. The price
is that copy, one forward pass over the rollout batch, and two exchanges, each of which moves all weights both ways.

A resumed run loads its first model again, which has to be the same.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plainrl.checkpoint import write_durably
from plainrl.config import GRPOConfig
from plainrl.distributed import local, on_first
from plainrl.lora import fingerprint_weights
from plainrl.policy import ON_CPU, load_policy, score_responses
from plainrl.precision import refresh_working_copy
from plainrl.records import Rollout, UserError
from plainrl.run_folder import RunFolder

FINGERPRINT = "first_policy.sha256"


class Reference:
    """The trained weights of the first policy."""

    def __init__(self, policy: PreTrainedModel, run: RunFolder, config: GRPOConfig) -> None:
        """Copy the weights of the policy in a new run, and load them in a resumed one.

        Args:
            policy: the policy. In a new run it has not been trained yet.
            run: the run's folder, where a new run leaves a fingerprint of the weights.
            config: names the first model, that of a warm start included.

        Raises:
            UserError: the first model is not the one that the run began with.
        """
        if run.checkpoint:
            policy, _ = load_policy(config.model_copy(update=ON_CPU), for_training=False)
        trained = _trained(policy)
        self._weights = {name: local(weight.detach()).cpu().clone() for name, weight in trained}
        is_pinned = config.policy_device != "cpu"  # a GPU copies from and to pinned memory several times as fast
        if is_pinned:
            self._weights = {name: weight.pin_memory() for name, weight in self._weights.items()}
        largest = max((weight.numel() for weight in self._weights.values()), default=0)
        self._aside = torch.empty(largest, pin_memory=is_pinned)  # takes one weight at a time
        found = fingerprint_weights(trained)
        on_first(lambda: self._compare(found, run, config))

    def _compare(self, found: str, run: RunFolder, config: GRPOConfig) -> None:
        path = run.path / FINGERPRINT
        if run.checkpoint and path.exists() and path.read_text() != found:
            raise UserError(
                f"model = {config.model}: it has changed since {run.path} began with it, and kl_coefficient = "
                f"{config.kl_coefficient:g} measures from it; bring it back, or begin a new run"
            )
        if not run.checkpoint or not path.exists():
            write_durably(path, found)

    def score(
        self,
        policy: PreTrainedModel,
        rollouts: Sequence[Rollout],
        padding_id: int,
        config: GRPOConfig,
        mark_weights: Callable[[bool], None],
    ) -> None:
        """Score every rollout with the first policy: its log-probs at the temperature of the sampling."""
        responses = [rollout.response for rollout in rollouts]
        settings = (config.scoring_batch_size, config.sampling_temperature)
        with self.in_place_of(policy, mark_weights):
            scores = score_responses(policy, responses, padding_id, *settings)
        for rollout, score in zip(rollouts, scores, strict=True):
            rollout.reference_log_probs = score["log_probs"]

    @contextmanager
    def in_place_of(self, policy: PreTrainedModel, mark_weights: Callable[[bool], None]) -> Iterator[None]:
        """Give the policy its first weights in a `with` statement. Afterwards it has its own again.

        Args:
            policy: the policy.
            mark_weights: is told false before the weights change, and true when they are the policy's own again. A run
                that is stopped in between must not save them.
        """
        mark_weights(False)
        self._exchange(policy)
        try:
            yield
        finally:
            self._exchange(policy)
            mark_weights(True)

    @torch.no_grad()
    def _exchange(self, policy: PreTrainedModel) -> None:
        for name, parameter in _trained(policy):
            part, other = local(parameter.detach()), self._weights[name]
            own = self._aside[: other.numel()].view(other.shape)
            own.copy_(part)
            part.copy_(other)
            other.copy_(own)
        refresh_working_copy(policy)


def _trained(policy: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Return the trained weights. With adapters these are A and B, and B is zero at first."""
    return [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
