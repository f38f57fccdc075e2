"""How long a run has trained, and whether its time is over (`max_training_hours`).

Steps and evaluations count. Loading, starting the engine and saving do not. A resumed run goes on where its clock
stood, because the time is read from its metrics.
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


def is_out_of_time(rows: Sequence[Mapping[str, Any]], max_hours: float) -> bool:
    """Return whether no further step fits: one like the longest so far, and an evaluation like the longest.

    Args:
        rows: of the run's metrics.
        max_hours: the limit in hours; 0: none.

    >>> rows = [{"eval_step": 0, "eval/seconds": 600.0}, {"train_step": 1, "time/step": 1200.0}]
    >>> is_out_of_time(rows, max_hours=1.0), is_out_of_time(rows, max_hours=0.99), is_out_of_time(rows, max_hours=0)
    (False, True, False)
    """
    longest = sum(max((row.get(name) or 0.0 for row in rows), default=0.0) for name in OF_TRAINING)
    return max_hours > 0 and training_seconds(rows) + longest > 3600 * max_hours
