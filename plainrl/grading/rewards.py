r"""Reward functions: does a response keep the format, and does its answer equal the ground truth?

    name            format_reward is 1 exactly if                    the answer is
    r1_zero         "</think> <answer>" and "</answer>" both occur   what follows the last <answer>
    question_only   there is a \boxed{}                              what the last \boxed{} holds

In r1_zero, an answer that holds a \boxed{} is what the last \boxed{} holds. In both, answer_reward and reward are 1
where the format is kept and the answer is right, else 0. An answer is right if it equals the ground truth
mathematically (equality.py). The comparison runs under limits on time and memory (worker.py). Where it exceeds a
limit, the answer is graded 0 and the grade names the reason.

To add a reward function, write the function and add one line to `REWARD_FUNCTIONS`. A function in a file of your own
needs no change here: `reward=my_rewards.py:my_reward`.
"""

import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsFloat

from plainrl.grading.equality import answers_match
from plainrl.grading.worker import NUM_WORKERS, GradingError

# (response, ground truth) -> {"reward": ...}, with "format_reward" and "answer_reward" as a rule
RewardFunction = Callable[[str, str], dict[str, float]]


class RewardError(ValueError):
    """A reward function returned something that is no reward: the user's mistake, shown as one line."""


class Grade(NamedTuple):
    """The rewards of a response and, where its answer could not be compared, why: timeout, memory or error."""

    rewards: dict[str, float]
    failure: str | None = None


def write_r1_zero(reasoning: str, answer: str) -> str:
    """Write a response in the format of r1_zero.

    >>> write_r1_zero("1 + 2 = 3.", "3")
    ' 1 + 2 = 3. </think> <answer> 3 </answer>'
    """
    return f" {reasoning} </think> <answer> {answer} </answer>"


def write_question_only(reasoning: str, answer: str) -> str:
    r"""Write a response in the format of question_only.

    >>> write_question_only("1 + 2 = 3.", "3")
    ' 1 + 2 = 3. The answer is \\boxed{3}.'
    """
    return f" {reasoning} The answer is \\boxed{{{answer}}}."


@dataclass(frozen=True)
class Reward:
    """A reward function, and what belongs to it.

    Attributes:
        function: maps (response, ground truth) to a dictionary of rewards.
        extract: returns the answer in a response, None if the format is not kept. With it, `grade_answer` grades what
            it returns: several at a time, under limits, with failures counted. Without it, `function` is called, for
            one response at a time.
        write_response: maps (reasoning, answer) to the text of an SFT response in the format that `function` asks for.
        prompt: name of the prompt template in plainrl/prompts that asks for this format, if there is one.
    """

    function: RewardFunction
    extract: Callable[[str], str | None] | None = None
    write_response: Callable[[str, str], str] = write_r1_zero
    prompt: str | None = None

    def __call__(self, response: str, ground_truth: str) -> dict[str, float]:
        """Return the rewards of a response."""
        return self.function(response, ground_truth)


def r1_zero_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    """Grade a response in the format of the r1_zero prompt.

    >>> r1_zero_reward_fn("1 + 1 = 2 </think> <answer> 2 </answer>", "2")
    {'format_reward': 1.0, 'answer_reward': 1.0, 'reward': 1.0}
    >>> r1_zero_reward_fn("2", "2")
    {'format_reward': 0.0, 'answer_reward': 0.0, 'reward': 0.0}
    """
    return grade_answer(extract_r1_zero(response), ground_truth).rewards


def question_only_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    r"""Grade a response whose answer stands in its last `\boxed{}`.

    >>> question_only_reward_fn(r"So it is \boxed{\frac{1}{2}}.", "0.5")["reward"]
    1.0
    """
    return grade_answer(last_boxed(response), ground_truth).rewards


def extract_r1_zero(response: str) -> str | None:
    r"""Return the answer in a response of the r1_zero format; None if the format is not kept.

    >>> extract_r1_zero(r"so </think> <answer> \boxed{4} </answer>")
    '4'
    """
    if "</think> <answer>" not in response or "</answer>" not in response:
        return None
    answer = response.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    boxed = last_boxed(answer)
    return answer if boxed is None else boxed


def last_boxed(text: str) -> str | None:
    r"""Return what the last complete `\boxed{...}` holds, nested braces included; None if there is none.

    >>> last_boxed(r"\boxed{1} then \boxed{\frac{2}{3}}")
    '\\frac{2}{3}'
    """
    openings: list[int | None] = []  # per open brace: where its box begins, or None if it opens no box
    last = None
    for match in re.finditer(r"\\(?:boxed|fbox)\s{0,20}\{|\\[{}]|[{}]", text):
        token = match[0]
        if token[0] == "\\" and token[-1] == "{" and len(token) > 2:
            openings.append(match.end())
        elif token == "{":
            openings.append(None)
        elif token == "}" and openings:
            start = openings.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, match.start()
    return None if last is None else text[last[0] : last[1]].strip()


# The choices of the key `reward`. Whatever depends on the reward function stands in its line, and nowhere else.
REWARD_FUNCTIONS: dict[str, Reward] = {
    "r1_zero": Reward(r1_zero_reward_fn, extract_r1_zero, write_r1_zero, prompt="r1_zero"),
    "question_only": Reward(question_only_reward_fn, last_boxed, write_question_only, prompt="question_only"),
}


def as_reward(reward_fn: str | Reward | RewardFunction) -> Reward:
    """Return the `Reward` that a name or a function stands for.

    Args:
        reward_fn: a name in `REWARD_FUNCTIONS`, a `Reward`, or a function of (response, ground truth). A function that
            stands in the table gives its line there. Any other gives a `Reward` without `extract`.

    Raises:
        ValueError: the table has no such name, or this is no function.

    >>> as_reward("r1_zero") is as_reward(r1_zero_reward_fn) is REWARD_FUNCTIONS["r1_zero"]
    True
    """
    if isinstance(reward_fn, Reward):
        return reward_fn
    if isinstance(reward_fn, str) and reward_fn in REWARD_FUNCTIONS:
        return REWARD_FUNCTIONS[reward_fn]
    if not callable(reward_fn):
        raise ValueError(f"reward_fn = {reward_fn!r}: use {', '.join(REWARD_FUNCTIONS)}, or a function")
    listed = (reward for reward in REWARD_FUNCTIONS.values() if reward.function is reward_fn)
    return next(listed, Reward(reward_fn))


def grade_responses(
    responses: Sequence[str], ground_truths: Sequence[str], reward_fn: str | Reward | RewardFunction
) -> list[Grade]:
    """Grade a batch of responses; whatever text a response holds, the grader itself raises nothing for it.

    The time is bounded by N x SECONDS_PER_ITEM / NUM_WORKERS. The first answer that needs sympy waits 1 to 2 seconds
    more, for its import.

    Args:
        responses: N responses.
        ground_truths: N answers.
        reward_fn: a name in `REWARD_FUNCTIONS`, a `Reward`, or a function of your own. See `grade_response` for what
            your function returns.

    Returns:
        N grades, in the order of the responses.

    Raises:
        ValueError: there is no such reward function, it returned no finite rewards, or N differs.
    """
    reward = as_reward(reward_fn)
    pairs = list(zip(responses, ground_truths, strict=True))
    if reward.extract is None:
        return [grade_response(response, truth, reward) for response, truth in pairs]
    with ThreadPoolExecutor(NUM_WORKERS) as threads:
        return list(threads.map(lambda pair: grade_response(pair[0], pair[1], reward), pairs))


def grade_response(response: str, ground_truth: str, reward_fn: str | Reward | RewardFunction) -> Grade:
    """Grade one response. Any thread may call this.

    A reward function of your own needs to return `reward` only. Where it leaves out `answer_reward`, that is taken to
    equal `reward`. Where it leaves out `format_reward`, that is taken to be 1. It is never called by two threads at
    once. What it raises is not caught.

    Raises:
        ValueError: there is no such reward function, or what it returned is no dictionary of finite numbers with
            `reward` among them.

    >>> grade_response("7", "8", lambda response, truth: {"reward": -abs(float(response) - float(truth))}).rewards
    {'reward': -1.0, 'answer_reward': -1.0, 'format_reward': 1.0}
    """
    reward = as_reward(reward_fn)
    if reward.extract is not None:
        return grade_answer(reward.extract(response), ground_truth)
    with _one_by_one:
        result = reward.function(response, ground_truth)
    return Grade(_complete_rewards(result, reward.function))


def grade_answer(answer: str | None, ground_truth: str) -> Grade:
    """Grade an extracted answer; None means that the response does not keep the format.

    >>> grade_answer("0.5", r"\\frac{1}{2}")
    Grade(rewards={'format_reward': 1.0, 'answer_reward': 1.0, 'reward': 1.0}, failure=None)
    """
    if answer is None:
        return Grade(dict.fromkeys(("format_reward", "answer_reward", "reward"), 0.0))
    try:
        correct, failure = float(answers_match(answer, ground_truth)), None
    except GradingError as error:
        correct, failure = 0.0, str(error)
    return Grade({"format_reward": 1.0, "answer_reward": correct, "reward": correct}, failure)


def count_failures(failures: Sequence[str | None]) -> dict[str, int]:
    """Return how many answers could not be compared, by reason.

    >>> count_failures(["timeout", None, "timeout"])
    {'timeouts': 2, 'out_of_memory': 0, 'errors': 0}
    """
    return {
        "timeouts": failures.count("timeout"),
        "out_of_memory": failures.count("memory"),
        "errors": failures.count("error"),
    }


_one_by_one = threading.RLock()  # a user's function need not be safe to call from several threads


def _complete_rewards(result: Any, function: RewardFunction) -> dict[str, float]:
    """Return what a user's function returned as floats, with the two keys that it may leave out."""
    rewards = {key: _as_float(value) for key, value in result.items()} if isinstance(result, Mapping) else {}
    if "reward" not in rewards or not all(map(math.isfinite, rewards.values())):
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"
        shown = repr(result) if len(repr(result)) <= 100 else f"{repr(result)[:100]}..."
        raise RewardError(
            f"the reward function {name} returned {shown}: return a dictionary of finite numbers with the key "
            "'reward', for example {'reward': 1.0}"
        )
    rewards.setdefault("answer_reward", rewards["reward"])
    rewards.setdefault("format_reward", 1.0)
    return rewards


def _as_float(value: Any) -> float:
    """Return a number as a float, that of numpy and torch too; NaN for anything else."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):  # an array of several numbers, an integer too large
        return math.nan
