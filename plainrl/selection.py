"""Which questions a step asks, and which of the sampled groups it trains on.

A group is the responses to one question. It is mixed if its answer rewards differ. In any other group every advantage
is zero, as long as the reward is the answer reward, and nothing is learnt from it.

    drop_solved_questions   a question whose last answers were right is not asked again
    dynamic_sampling        further questions are asked, in rounds, until enough groups are mixed

Sources: Yu et al. 2025 (DAPO), section 3.2, dynamic sampling; Khatri et al. 2025 (ScaleRL), no-positive-resampling.

Differences: DAPO's code in verl draws a whole batch in each round. With a limit on rounds it fails at the end of them.
Here a round asks as many questions as the step needs by its own share of mixed groups. A batch that stays short is
filled up with other groups. ScaleRL leaves a solved question out for good, by all its answers so far. Here the last
ones count, and all are asked again when too few are left.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from plainrl.config import GRPOConfig
from plainrl.data import order_of_epoch
from plainrl.grading.rewards import Grade
from plainrl.records import Rollout, mean

Graded = Sequence[Grade] | Sequence[Rollout]  # both have the rewards of a response


class Visit(NamedTuple):
    """One group of responses to a question: the sum of their answer rewards, and how many there are."""

    answer_reward: float
    num_responses: int


class QuestionOrder:
    """Draws the questions of a run: all of them in a random order, then again in another. Solved ones are passed over.

    With `drop_solved_questions`, a question is solved if the mean answer reward of its last `solved_visits` groups is
    `solved_pass_rate` or more. As soon as fewer unsolved questions are left than a step asks, all are asked again.

    The state is the position in the order and, with `drop_solved_questions`, how each question was answered last.
    """

    def __init__(self, num_questions: int, config: GRPOConfig) -> None:
        """Begin at the first epoch; nothing is solved.

        Args:
            num_questions: how many there are. Questions are drawn by index.
            config: the keys named above, and the seed of the order.
        """
        self._num_questions, self._config = num_questions, config
        self._position = 0  # in the order of all epochs, questions passed over included
        self._visits: dict[int, list[Visit]] = {}  # of each question, the last ones
        self._epoch: tuple[int, list[int]] | None = None  # the last epoch looked at, and its order

    @property
    def num_solved(self) -> int:
        """How many questions are not asked again."""
        return sum(map(self._is_solved, self._visits))

    def draw(self, count: int) -> list[int]:
        """Return the indices of the next `count` questions, at most as many as a step asks."""
        num_left = self._num_questions - self.num_solved
        if num_left < self._config.num_questions_per_step:
            tqdm.write(
                f"{self.num_solved} of {self._num_questions} training questions are solved, and the other {num_left} "
                "are too few for a step: all are asked again",
                file=sys.stdout,
            )
            self._visits = {}
        drawn: list[int] = []
        while len(drawn) < count:
            index = self._at(self._position)
            self._position += 1
            if not self._is_solved(index):
                drawn.append(index)
        return drawn

    def record(self, chosen: Sequence[int], grades: Graded) -> None:
        """Note how a step's groups were answered.

        Args:
            chosen: indices of the questions.
            grades: of the responses, `group_size` for each question in turn.
        """
        if not self._config.drop_solved_questions:
            return
        for index, rewards in zip(chosen, answer_rewards(grades, self._config.group_size), strict=True):
            visits = [*self._visits.get(index, []), Visit(sum(rewards), len(rewards))]
            self._visits[index] = visits[-self._config.solved_visits :]

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on from here, as JSON. Later draws do not change it."""
        visits = {str(index): [list(visit) for visit in of_one] for index, of_one in self._visits.items()}
        return {"position": self._position, "visits": visits}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from a state after `step`. If it is empty, as in older checkpoints, every step asked one batch."""
        self._position = state.get("position", step * self._config.num_questions_per_step)
        # Older checkpoints hold the sum alone, of groups of the same size.
        size = self._config.group_size
        self._visits = {
            int(index): [Visit(*visit) if isinstance(visit, list) else Visit(visit, size) for visit in visits]
            for index, visits in state.get("visits", {}).items()
        }

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self._num_questions)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, order_of_epoch(self._num_questions, epoch, self._config.seed)
        return self._epoch[1][place]

    def _is_solved(self, index: int) -> bool:
        visits = self._visits.get(index, [])[-self._config.solved_visits :]
        if not self._config.drop_solved_questions or len(visits) < self._config.solved_visits:
            return False
        num_responses = sum(visit.num_responses for visit in visits)
        return sum(visit.answer_reward for visit in visits) / num_responses >= self._config.solved_pass_rate


def answer_rewards(grades: Graded, group_size: int) -> list[list[float]]:
    """Return the answer rewards of each group in turn."""
    rewards = [grade.rewards["answer_reward"] for grade in grades]
    return [rewards[start : start + group_size] for start in range(0, len(rewards), group_size)]


def find_mixed(grades: Graded, group_size: int) -> list[bool]:
    """Return for each group whether its answer rewards differ.

    The reward that is trained on does not count here. It may also reward the format or the length. A batch chosen by it
    would then hold many groups without a right answer, which teach format and length alone.
    """
    return [len(set(rewards)) > 1 for rewards in answer_rewards(grades, group_size)]


def num_questions_to_ask(num_sampled: int, num_mixed: int, num_wanted: int) -> int:
    """Return how many further questions a step asks: as many as it needs by its own share of mixed groups.

        ceil( (wanted - mixed) * sampled / mixed ),    at most `num_wanted`

    Args:
        num_sampled: groups sampled in this step.
        num_mixed: how many of them are mixed. With none, `num_wanted` further questions are asked.
        num_wanted: mixed groups that the step trains on.

    >>> num_questions_to_ask(num_sampled=16, num_mixed=12, num_wanted=16)
    6
    """
    missing = max(num_wanted - num_mixed, 0)
    return min(math.ceil(missing * num_sampled / num_mixed), num_wanted) if num_mixed else num_wanted


def choose_batch(graded: Sequence[Rollout], config: GRPOConfig) -> list[Rollout]:
    """Return the rollouts to train on: `num_questions_per_step` groups, in the order in which they were drawn.

    Without `dynamic_sampling` these are all. With it, mixed groups come before others, and earlier ones before later
    ones. Groups that are not mixed fill the batch up where mixed ones are too few. So it always holds
    `rollout_batch_size` responses, and no divisor of the loss changes.

    Args:
        graded: all sampled responses. Those of a group stand next to each other.
        config: `dynamic_sampling`, and the sizes of batch and group.
    """
    if not config.dynamic_sampling:
        return list(graded)
    is_mixed = find_mixed(graded, config.group_size)
    by_use = sorted(range(len(is_mixed)), key=lambda group: not is_mixed[group])  # a stable sort
    starts = [group * config.group_size for group in sorted(by_use[: config.num_questions_per_step])]
    return [rollout for start in starts for rollout in graded[start : start + config.group_size]]


def overlong_penalty(num_tokens: int, max_tokens: int, cache_tokens: int) -> float:
    """Return the soft penalty on a response that comes close to the length limit, or reaches it.

        clip( (L_max - L_cache - |y|) / L_cache, -1, 0 ),    0 without a cache

    Args:
        num_tokens: the length of the response, |y|.
        max_tokens: the longest that a response may be, L_max.
        cache_tokens: how many tokens before that the penalty begins, L_cache. 0: there is no penalty.

    Source: Yu et al. 2025 (DAPO), equation 13.

    >>> [overlong_penalty(num_tokens, max_tokens=100, cache_tokens=20) for num_tokens in (80, 85, 100)]
    [0.0, -0.25, -1.0]
    """
    return min(max((max_tokens - cache_tokens - num_tokens) / cache_tokens, -1.0), 0.0) if cache_tokens else 0.0


def training_reward(rollout: Rollout, config: GRPOConfig) -> float:
    """Return the reward that advantages and losses see: that of the reward function, plus the overlong penalty."""
    return rollout.rewards["reward"] + _penalty_of(rollout, config)


def summarize_selection(
    graded: Sequence[Rollout], num_rounds: int, order: QuestionOrder, step: int, config: GRPOConfig
) -> dict[str, float | None]:
    """Return the metrics of what a step sampled and chose. docs/metrics.md defines them.

    Args:
        graded: all rollouts of the step, group by group.
        num_rounds: in how many rounds they were sampled.
        order: after the step.
        step: its number.
        config: of the run.
    """
    is_mixed = find_mixed(graded, config.group_size)
    return {
        "rollout/resampling_rounds": num_rounds - 1,
        "rollout/num_mixed_groups": sum(is_mixed),
        "rollout/num_dropped_groups": len(is_mixed) - config.num_questions_per_step,
        "rollout/num_solved_questions": order.num_solved,
        "rollout/policy_lag": mean([step - 1 - rollout.response.policy_step for rollout in graded]),
        "rollout/overlong_penalty": mean([_penalty_of(rollout, config) for rollout in graded]),
    }


def _penalty_of(rollout: Rollout, config: GRPOConfig) -> float:
    num_tokens = len(rollout.response.token_ids)
    return overlong_penalty(num_tokens, config.sampling_max_tokens, config.overlong_cache_tokens)
