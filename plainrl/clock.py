"""How long a run has trained, and whether it is at its limit: `max_training_hours` or `max_sampled_tokens`.

Of the time, steps and evaluations count. Loading, starting the engine and saving do not. Of the tokens, all that were
sampled to train on count. A resumed run goes on where both stood, because they are read from its metrics.
"""

from collections.abc import Mapping, Sequence
from typing import Any

# The metrics that hold seconds of evaluations. DPO's also score pairs. `eval_all` is after the last step.
OF_EVALUATIONS = ("eval/seconds", "eval/pair_seconds")
OF_ALL_EVALUATIONS = (*OF_EVALUATIONS, "eval_all/seconds")
OF_TRAINING = ("time/step", *OF_EVALUATIONS)
OF_RUN = ("time/step", *OF_ALL_EVALUATIONS)


def training_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds of all steps and evaluations in a run's metrics.

    >>> training_seconds([{"eval_step": 0, "eval/seconds": 30.0}, {"train_step": 1, "time/step": 60.0}])
    90.0
    """
    return sum(row.get(name) or 0.0 for row in rows for name in OF_TRAINING)


def is_out_of_time(rows: Sequence[Mapping[str, Any]], max_hours: float, num_evaluations: int = 1) -> bool:
    """Return whether no further step fits: one like the longest so far, and evaluations like the longest.

    Args:
        rows: of the run's metrics.
        max_hours: the limit in hours; 0: none.
        num_evaluations: how many there are until the next step has ended and been evaluated.

    >>> rows = [{"eval_step": 0, "eval/seconds": 600.0}, {"train_step": 1, "time/step": 1200.0}]
    >>> is_out_of_time(rows, max_hours=1.0), is_out_of_time(rows, max_hours=0.99), is_out_of_time(rows, max_hours=0)
    (False, True, False)
    >>> is_out_of_time(rows, max_hours=1.0, num_evaluations=2)
    True
    """

    def longest(name: str) -> float:
        return max((row.get(name) or 0.0 for row in rows), default=0.0)

    needed = longest("time/step") + num_evaluations * sum(map(longest, OF_EVALUATIONS))
    return max_hours > 0 and training_seconds(rows) + needed > 3600 * max_hours


def sampled_tokens(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the response tokens that were sampled in all rollouts of a run's metrics; evaluations are left out.

    >>> sampled_tokens([{"train_step": 1, "rollout/num_sampled_tokens": 300}, {"eval_step": 1, "eval/seconds": 1.0}])
    300
    """
    return sum(row.get("rollout/num_sampled_tokens") or 0 for row in rows)


def reached_limit(
    rows: Sequence[Mapping[str, Any]], max_hours: float, max_tokens: int, num_evaluations: int = 1
) -> str:
    """Return the limit at which a run ends, as `key = value`; an empty text if it may go on.

    The time is never passed: see `is_out_of_time`. The tokens are reached or passed by the last step.

    Args:
        rows: of the run's metrics.
        max_hours: limit in hours; 0: none.
        max_tokens: limit in sampled tokens; 0: none.
        num_evaluations: as for `is_out_of_time`.

    >>> rows = [{"train_step": 1, "rollout/num_sampled_tokens": 300}]
    >>> reached_limit(rows, 0, 300), reached_limit(rows, 0, 301), reached_limit(rows, 0, 0)
    ('max_sampled_tokens = 300', '', '')
    """
    if is_out_of_time(rows, max_hours, num_evaluations):
        return f"max_training_hours = {max_hours:g}"
    return f"max_sampled_tokens = {max_tokens}" if 0 < max_tokens <= sampled_tokens(rows) else ""
