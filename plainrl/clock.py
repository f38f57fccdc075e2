"""How long a run has trained, and whether it is at its limit: `max_training_hours` or `max_sampled_tokens`.

Of the time, steps and evaluations count. Loading, starting the engine and saving do not. Of the tokens, all that were
sampled to train on count. A resumed run goes on where both stood, because they are read from its metrics.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

# The metrics that hold seconds of evaluations. DPO's also score pairs. `eval_all` is after the last step.
OF_EVALUATIONS = ("eval/seconds", "eval/pair_seconds")
OF_ALL_EVALUATIONS = (*OF_EVALUATIONS, "eval_all/seconds")
OF_TRAINING = ("time/step", *OF_EVALUATIONS)
OF_RUN = ("time/step", *OF_ALL_EVALUATIONS)


@dataclass
class Used:
    """What a run has used so far.

    >>> used = Used.of([{"eval_step": 0, "eval/seconds": 30.0}, {"train_step": 1, "time/step": 60.0}])
    >>> used.seconds, used.longest["time/step"], used.tokens
    (90.0, 60.0, 0)
    """

    seconds: float = 0.0  # of all steps and evaluations
    longest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(OF_TRAINING, 0.0))  # one, in seconds
    tokens: int = 0  # sampled in all rollouts; evaluations are left out

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """Return what the rows of a run's metrics say."""
        used = cls()
        for row in rows:
            used.add(row)
        return used

    def add(self, row: Mapping[str, Any]) -> None:
        """Add what one more row says."""
        for name in OF_TRAINING:
            seconds = row.get(name) or 0.0
            self.seconds += seconds
            self.longest[name] = max(self.longest[name], seconds)
        self.tokens += row.get("rollout/num_sampled_tokens") or 0


def is_out_of_time(used: Used, max_hours: float, num_evaluations: int = 1) -> bool:
    """Return whether no further step fits: one like the longest so far, and evaluations like the longest.

    Args:
        used: by the run so far.
        max_hours: the limit in hours; 0: none.
        num_evaluations: how many there are until the next step has ended and been evaluated.

    >>> used = Used.of([{"eval_step": 0, "eval/seconds": 600.0}, {"train_step": 1, "time/step": 1200.0}])
    >>> is_out_of_time(used, max_hours=1.0), is_out_of_time(used, max_hours=0.99), is_out_of_time(used, max_hours=0)
    (False, True, False)
    >>> is_out_of_time(used, max_hours=1.0, num_evaluations=2)
    True
    """
    needed = used.longest["time/step"] + num_evaluations * sum(used.longest[name] for name in OF_EVALUATIONS)
    return max_hours > 0 and used.seconds + needed > 3600 * max_hours


def reached_limit(used: Used, max_hours: float, max_tokens: int, num_evaluations: int = 1) -> str:
    """Return the limit at which a run ends, as `key = value`; an empty text if it may go on.

    The time is never passed: see `is_out_of_time`. The tokens are reached or passed by the last step.

    Args:
        used: by the run so far.
        max_hours: limit in hours; 0: none.
        max_tokens: limit in sampled tokens; 0: none.
        num_evaluations: as for `is_out_of_time`.

    >>> used = Used.of([{"train_step": 1, "rollout/num_sampled_tokens": 300}])
    >>> reached_limit(used, 0, 300), reached_limit(used, 0, 301), reached_limit(used, 0, 0)
    ('max_sampled_tokens = 300', '', '')
    """
    if is_out_of_time(used, max_hours, num_evaluations):
        return f"max_training_hours = {max_hours:g}"
    return f"max_sampled_tokens = {max_tokens}" if 0 < max_tokens <= used.tokens else ""
