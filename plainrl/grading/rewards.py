r"""Reward functions: does a response keep the format, and does its answer equal the ground truth?

    name            format_reward is 1 exactly if                    the answer is
    r1_zero         "</think> <answer>" and "</answer>" both occur   what follows the last <answer>
    question_only   there is a \boxed{}                              what the last \boxed{} holds

In r1_zero, an answer that holds a \boxed{} is what the last \boxed{} holds. In both, answer_reward and reward are 1
where the format is kept and the answer equals the ground truth mathematically (equality.py), else 0. A comparison that
exceeds a limit is graded 0, and the grade names the reason.

To add a reward function, write the function and add one line to `REWARD_FUNCTIONS`. A function in a file of your own
needs no change here: `reward=my_rewards.py:my_reward`.
"""

import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsFloat

from plainrl.grading.arithmetic import GradingError
from plainrl.grading.equality import answers_match
from plainrl.grading.spelling import MAX_ANSWER_CHARS, RULES

# (response, ground truth) -> {"reward": ...}, with "format_reward" and "answer_reward" as a rule
RewardFunction = Callable[[str, str], dict[str, float]]

NUM_WORKERS = 2  # threads that grade while others sample
MAX_WORDS = 60  # of a ground truth; a longer one is a solution rather than an answer
SENTENCES = re.compile(r"[a-z0-9)$}][.!?]\s+[A-Z][a-z]*\s+[a-z0-9\\$]|\n\s*\n|\n[^\n]*=[^\n]*\d\s*$")
WORDS = re.compile(r"\b(?!(?:and|or|text)\b)[A-Za-z]{2}|\d")


class RewardError(ValueError):
    """A reward function returned something that is no reward: the user's mistake, shown as one line."""


class Grade(NamedTuple):
    """The rewards of a response and, where its answer could not be compared, why."""

    rewards: dict[str, float]
    failure: str | None = None


def write_r1_zero(reasoning: str, answer: str) -> str:
    """Write a response in the format of r1_zero."""
    return f" {reasoning} </think> <answer> {answer} </answer>"


def write_question_only(reasoning: str, answer: str) -> str:
    """Write a response in the format of question_only."""
    return f" {reasoning} The answer is \\boxed{{{answer}}}."


@dataclass(frozen=True)
class Reward:
    """A reward function, and what belongs to it.

    Attributes:
        function: maps (response, ground truth) to a dictionary of rewards.
        extract: returns the answer in a response, None if the format is not kept; `grade_answer` then grades it.
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


AnyReward = str | Reward | RewardFunction  # a name in `REWARD_FUNCTIONS`, or what belongs to it, or the function alone


def r1_zero_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    """Grade a response in the format of the r1_zero prompt.

    >>> r1_zero_reward_fn("1 + 1 = 2 </think> <answer> 2 </answer>", "2")
    {'format_reward': 1.0, 'answer_reward': 1.0, 'reward': 1.0}
    """
    return grade_answer(extract_r1_zero(response), ground_truth).rewards


def question_only_reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    r"""Grade a response whose answer stands in its last `\boxed{}`."""
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
    openings, boxes = [], {}  # what is open: where its box begins, or -1 if it is none
    for match in re.finditer(r"(\\(?:boxed|fbox)\s{0,20}\{)|\\[{}]|[{}]", text):
        if match[1] or match[0] == "{":
            openings.append(match.end() if match[1] else -1)
        elif match[0] == "}" and openings:
            boxes[openings.pop()] = match.start()
    start = max(boxes, default=-1)
    return None if start < 0 else text[start : boxes[start]].strip()


# The choices of the key `reward`. Whatever depends on the reward function stands in its line, and nowhere else.
REWARD_FUNCTIONS: dict[str, Reward] = {
    "r1_zero": Reward(r1_zero_reward_fn, extract_r1_zero, write_r1_zero, prompt="r1_zero"),
    "question_only": Reward(question_only_reward_fn, last_boxed, write_question_only, prompt="question_only"),
}


def as_reward(reward_fn: AnyReward) -> Reward:
    """Return the `Reward` for a name in `REWARD_FUNCTIONS` or a function; raise ValueError for anything else.

    >>> as_reward("r1_zero") is as_reward(r1_zero_reward_fn) is REWARD_FUNCTIONS["r1_zero"]
    True
    """
    found = REWARD_FUNCTIONS.get(reward_fn) if isinstance(reward_fn, str) else reward_fn
    if isinstance(found, Reward):
        return found
    if not callable(found):
        raise ValueError(f"reward_fn = {reward_fn!r}: use {', '.join(REWARD_FUNCTIONS)}, or a function")
    return next((reward for reward in REWARD_FUNCTIONS.values() if reward.function is found), Reward(found))


def grade_responses(responses: Sequence[str], ground_truths: Sequence[str], reward_fn: AnyReward) -> list[Grade]:
    """Grade a batch of responses, and return the grades in their order; see `grade_response`."""
    reward = as_reward(reward_fn)
    return [grade_response(response, truth, reward) for response, truth in zip(responses, ground_truths, strict=True)]


def grade_response(response: str, ground_truth: str, reward_fn: AnyReward) -> Grade:
    """Grade one response; whatever text it holds, the grader itself raises nothing for it. Any thread may call this.

    A function of your own needs to return `reward` only. `answer_reward` is then taken to equal it, and `format_reward`
    to be 1. It is never called by two threads at once, and what it raises is not caught. A result that is no
    dictionary of finite numbers with `reward` among them raises a ValueError.

    >>> grade_response("7", "8", lambda response, truth: {"reward": -abs(float(response) - float(truth))}).rewards
    {'reward': -1.0, 'answer_reward': -1.0, 'format_reward': 1.0}
    """
    reward = as_reward(reward_fn)
    if reward.extract is not None:
        return grade_answer(reward.extract(response), ground_truth)
    with _one_by_one:
        result = reward.function(response, ground_truth)
    return Grade(_complete_rewards(result, reward.function))


def grade_answer(answer: str | None, ground_truth: Any) -> Grade:
    """Grade an extracted answer; None means that the response does not keep the format.

    >>> grade_answer("0.5", r"\\frac{1}{2}")
    Grade(rewards={'format_reward': 1.0, 'answer_reward': 1.0, 'reward': 1.0}, failure=None)
    """
    if answer is None:
        return Grade(dict.fromkeys(("format_reward", "answer_reward", "reward"), 0.0))
    answer, truths = clean_ground_truth(answer), _alternatives(clean_ground_truth(ground_truth))
    try:
        correct, failure = float(any(answers_match(answer, truth) for truth in truths)), None
    except GradingError as error:
        correct, failure = 0.0, str(error)
    return Grade({"format_reward": 1.0, "answer_reward": correct, "reward": correct}, failure)


def count_failures(failures: Sequence[str | None]) -> dict[str, int]:
    """Return how many answers could not be compared, by reason.

    >>> count_failures(["timeout", None, "timeout"])
    {'timeouts': 2, 'out_of_memory': 0, 'errors': 0}
    """
    names = {"timeouts": "timeout", "out_of_memory": "memory", "errors": "error"}
    return {name: failures.count(failure) for name, failure in names.items()}


def clean_ground_truth(truth: Any) -> str:
    r"""Return a text, a number, or a list or tuple of alternatives as text, without what only announces the answer.

    The answer is what the last box, `<answer>` or `####` holds, or what follows "The answer is". Alternatives, any of
    which is right, are written as a JSON list of texts. The empty text stands for no ground truth.

    >>> [clean_ground_truth(truth) for truth in (5, r"\\boxed{24}", "2 + 3 = 5 #### 5", "The answer is 7.", [1, "2"])]
    ['5', '24', '5', '7', '["1", "2"]']
    """
    if isinstance(truth, list | tuple):
        texts = list(dict.fromkeys(filter(None, map(clean_ground_truth, truth))))
        return json.dumps(texts, ensure_ascii=False) if len(texts) > 1 else "".join(texts)
    text = "" if truth is None else str(truth).strip()
    if text.lower().lstrip("+-") in ("nan", "inf")[: 1 if isinstance(truth, str) else 2]:
        return ""
    box = RULES["box"].pattern
    if "box" in text and len(box.findall(text)) > 1 and not WORDS.search(box.sub("", text)):
        return box.sub(r"\1", text)  # an answer in several boxes
    text = text.rpartition("####")[2].rpartition("<answer>")[2].partition("</answer>")[0]
    boxed = last_boxed(text)
    return RULES["announcement"].pattern.sub("", text.strip()).removesuffix(".") if boxed is None else boxed


def is_gradable(ground_truth: str, reward: Reward) -> bool:
    r"""Return whether a response can equal a ground truth: it is no prose, and equals itself once it is extracted.

    >>> [is_gradable(truth, as_reward("r1_zero")) for truth in (r"\\frac{1}{2}", "", "Add both. The sum is 5.")]
    [True, False, False]
    """
    return reward.extract is None or any(  # a function of one's own may grade any text
        text.strip("$ {}.,;") != ""
        and len(text) <= MAX_ANSWER_CHARS
        and len(text.split()) <= MAX_WORDS
        and not SENTENCES.search(text)
        and grade_response(reward.write_response("", text), text, reward).rewards["answer_reward"] == 1
        for text in _alternatives(ground_truth)
    )


_one_by_one = threading.RLock()  # a user's function need not be safe to call from several threads


def _complete_rewards(result: Any, function: RewardFunction) -> dict[str, float]:
    """Return what a user's function returned as floats, with the two keys that it may leave out."""
    items = result.items() if isinstance(result, Mapping) else ()
    try:  # numbers of numpy and torch are numbers too; text, an array of several and an integer too large are none
        rewards = {key: float(value) if isinstance(value, SupportsFloat) else math.nan for key, value in items}
    except (TypeError, ValueError, RuntimeError, OverflowError):
        rewards = {}
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


def _alternatives(ground_truth: str) -> list[str]:
    """Return the answers that a cleaned ground truth allows: one, or those of a JSON list of texts."""
    try:
        texts = json.loads(ground_truth) if ground_truth.startswith('["') else None
    except ValueError:
        texts = None
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else [ground_truth]
