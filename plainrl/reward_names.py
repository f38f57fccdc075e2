"""What the key `reward` may hold: a name, a function of the user's own, or a weighted sum of several.

reward=r1_zero
reward=my_rewards.py:brief
reward=r1_zero*0.9+my_rewards.py:brief*0.1
reward: [r1_zero*0.9, my_rewards.py:brief*0.1]     # the same in a YAML file
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from plainrl.grading.own_rewards import TAKEN_KEYS, USUAL_KEYS, RewardError, wanted_fields
from plainrl.lookup import TableOf, look_up
from plainrl.records import UserError

if TYPE_CHECKING:
    from plainrl.grading.rewards import Reward

REWARD_FUNCTIONS = TableOf("plainrl.grading.rewards", "REWARD_FUNCTIONS")  # its names can be read without the grader
WEIGHT = re.compile(r"\*\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*\Z")
END_OF_TERM = re.compile(r"(?<=[\w\s.])\+(?=\s*[\w./~])")


class Term(NamedTuple):
    """One reward of a sum."""

    name: str
    weight: float


def read_terms(value: str | Sequence[str]) -> list[Term]:
    """Return the rewards that a value of the key names, each with its weight.

    Raises:
        UserError: a weight is no finite number.

    >>> read_terms("r1_zero*0.9 + my.py:brief*-0.5")
    [Term(name='r1_zero', weight=0.9), Term(name='my.py:brief', weight=-0.5)]
    >>> read_terms(["my.py:brief"])
    [Term(name='my.py:brief', weight=1.0)]
    """
    texts = _split(value) if isinstance(value, str) else value
    terms = []
    for text in texts:
        found = WEIGHT.search(text)
        try:
            weight = float(found[1]) if found else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UserError(f"reward = {value}: {text.strip()} has no finite weight; write NAME*0.5")
        terms.append(Term(text[: found.start()].strip() if found else text.strip(), weight))
    if not terms:
        raise UserError("reward = []: name at least one reward")
    return terms


def find_reward(value: str | Sequence[str], max_seconds: float | None = None) -> "Reward":
    """Return the reward that a value of the key stands for.

    Args:
        value: see above.
        max_seconds: limit for one call of a function of the user's own, in seconds.

    Raises:
        UserError: a name is unknown, a file fails, or a function does not take a response and a ground truth.
    """
    from plainrl.grading.rewards import as_reward, weighted_sum

    terms = read_terms(value)
    parts: list[tuple[str, float, Reward]] = []
    for term in terms:
        found = as_reward(look_up(term.name, REWARD_FUNCTIONS, "reward"))
        if not found.extract:
            try:
                wanted_fields(found.function)
            except RewardError as error:
                raise UserError(f"reward = {value}: {error}") from None
            found = replace(found, max_seconds=max_seconds)
        parts.append((_short_name(term.name, [name for name, _, _ in parts]), term.weight, found))
    if len(parts) == 1 and terms[0].weight == 1:
        return parts[0][2]
    return weighted_sum(parts)


def check_names(value: str | Sequence[str]) -> None:
    """Raise a UserError unless each reward can be found. Names of the table are taken without importing the grader."""
    if any(term.name not in REWARD_FUNCTIONS for term in read_terms(value)):
        find_reward(value)


def _split(text: str) -> list[str]:
    """Split a sum into its terms. One function in a file that exists is not split, whatever its path holds."""
    place, _, function = WEIGHT.sub("", text).rpartition(":")
    return [text] if function.strip().isidentifier() and Path(place).is_file() else END_OF_TERM.split(text)


def _short_name(name: str, others: Sequence[str]) -> str:
    """Return under which name a part of a sum is logged: its function's, with a number if it comes twice.

    >>> _short_name("a.py:brief", []), _short_name("b.py:brief", ["brief"])
    ('brief', 'brief_2')
    """
    short = name.rpartition(":")[2]
    taken = {*others, *TAKEN_KEYS, *USUAL_KEYS}
    return next(n for n in (short, *(f"{short}_{number}" for number in range(2, len(taken) + 3))) if n not in taken)
