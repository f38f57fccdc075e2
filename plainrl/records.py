"""What flows through a run, and the two ways in which a user ends one.

Example            a question, its prompt, its ground truth, perhaps a response to imitate
TokenizedExample   the same as token ids, for SFT
Response           token ids that the engine sampled, with its log-probs
Rollout            a response with its rewards and its advantage
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # reading records should not wait for torch
    from torch import Tensor


class Fields(dict[str, Any]):
    """Columns of a record by name. Examples stand in sets, and so these have a hash: that of the names."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self))


MOST_SHOWN = 300  # characters of a library's error in a message
NO_FIELDS = Fields()


class Example(NamedTuple):
    """A question, the prompt that asks it, its ground truth, and the response to imitate where there is one.

    `fields` are the columns of the record that the reward asks for. `dataset` is the name of a further validation set.
    """

    question: str
    prompt: str
    ground_truth: str | None
    response: str | None
    source: str
    fields: Fields = NO_FIELDS
    dataset: str = ""

    @property
    def reward_fields(self) -> dict[str, Any]:
        """Return what a reward function may ask for, by name."""
        return {**self.fields, "question": self.question, "prompt": self.prompt}


class TokenizedExample(NamedTuple):
    """A training example as token ids."""

    example: Example
    prompt_ids: list[int]
    response_ids: list[int]


class Response(NamedTuple):
    """A sampled response.

    If asked for, `log_probs` are the engine's, one per token, under the sampling distribution. Else they are empty.
    """

    prompt_ids: list[int]
    text: str
    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    engine: int = 0  # number of the engine that sampled it, where several ranks have one each
    policy_step: int = 0  # number of rollout batches that the policy which sampled it had been trained on


@dataclass
class Rollout:
    """A response with its rewards and its advantage: what the update needs."""

    example: Example
    response: Response
    rewards: dict[str, float]
    advantage: float  # in expert iteration: 1 if the response is kept, else 0
    grading_failure: str | None = None
    old_log_probs: "Tensor | None" = None  # (number of response tokens,), before the first step on it
    reference_log_probs: "Tensor | None" = None  # likewise, of the run's first policy

    @property
    def is_truncated(self) -> bool:
        """Whether the response was cut at the length limit."""
        return self.response.finish_reason == "length"


class UserError(ValueError):
    """A mistake that a user can fix. It is shown as one line, without a traceback, with exit status 2."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run. As a KeyboardInterrupt, so that no library takes it for an error of its own."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.status = 128 + signal_number

    def __reduce__(self) -> tuple[type["Stopped"], tuple[int]]:
        """Let it travel to other ranks."""
        return Stopped, (self.status - 128,)


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error; its kind if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def one_line(error: BaseException) -> str:
    """Return a library's error in one line, cut; its kind if it says nothing."""
    return " ".join(str(error).split())[:MOST_SHOWN] or type(error).__name__


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return sum(values) / len(values) if values else None
