r"""Reward functions: does a response keep the format, and does its answer equal the ground truth?

    name            format_reward is 1 exactly if                    the answer is
    r1_zero         "</think> <answer>" and "</answer>" both occur   what follows the last <answer>
    question_only   there is a \boxed{}                              what the last \boxed{} holds

In r1_zero, an answer that holds a \boxed{} is what the last \boxed{} holds. In both, answer_reward and reward are 1
where the format is kept and the answer equals the ground truth mathematically (equality.py), else 0. A comparison that
exceeds a limit is graded 0, and the grade names the reason.

To add a reward function, write the function and add one line to `REWARD_FUNCTIONS`. A function in a file of your own
needs no change here: `reward=my_rewards.py:my_reward`. own_rewards.py says how it is called. `weighted_sum` makes one
reward of several.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from plainrl.grading.arithmetic import GradingError
from plainrl.grading.equality import answers_match
from plainrl.grading.own_rewards import USUAL_KEYS, CallError, RewardError, Wanted, call_reward, say_once, wanted_fields
from plainrl.grading.spelling import MAX_ANSWER_CHARS, RULES

# (response, ground truth) -> {"reward": ...}, with "format_reward" and "answer_reward" as a rule, or a number
RewardFunction = Callable[..., Any]

NUM_WORKERS = 2  # threads that grade while others sample
MAX_WORDS = 60  # of a ground truth; a longer one is a solution rather than an answer
SENTENCES = re.compile(r"[a-z0-9)$}][.!?]\s+[A-Z][a-z]*\s+[a-z0-9\\$]|\n\s*\n|\n[^\n]*=[^\n]*\d\s*$")
WORDS = re.compile(r"\b(?!(?:and|or|text)\b)[A-Za-z]{2}|\d")


class Grade(NamedTuple):
    """The rewards of a response and, where it could not be graded, why.

    `failure` is the kind that `count_failures` counts. `problem` says in one line what a function of the user's own
    did wrong.
    """

    rewards: dict[str, float]
    failure: str | None = None
    problem: str | None = None


def write_r1_zero(reasoning: str, answer: str) -> str:
    """Write a response in the format of r1_zero."""
    return f" {reasoning} </think> <answer> {answer} </answer>"


def write_question_only(reasoning: str, answer: str) -> str:
    """Write a response in the format of question_only."""
    return f" {reasoning} The answer is \\boxed{{{answer}}}."


NOTHING = Wanted(frozenset(), frozenset(), takes_all=False)


@dataclass(frozen=True)
class Reward:
    """A reward function, and what belongs to it.

    Attributes:
        function: maps (response, ground truth) to a dictionary of rewards.
        extract: returns the answer in a response, None if the format is not kept; `grade_answer` then grades it.
        write_response: maps (reasoning, answer) to the text of an SFT response in the format that `function` asks for.
        prompt: name of the prompt template in plainrl/prompts that asks for this format, if there is one.
        max_seconds: limit for one call of `function`, in seconds (None: no limit).
        parts: the rewards of a weighted sum, by name, each with its weight. They grade in place of `function`.
    """

    function: RewardFunction
    extract: Callable[[str], str | None] | None = None
    write_response: Callable[[str, str], str] = write_r1_zero
    prompt: str | None = None
    max_seconds: float | None = None
    parts: tuple[tuple[str, float, "Reward"], ...] = ()

    def __call__(self, response: str, ground_truth: str, **fields: Any) -> Any:
        """Return the rewards of a response."""
        return self.function(response, ground_truth, **fields)

    @property
    def wanted(self) -> Wanted:
        """Return the fields of a record that the reward asks for."""
        if self.parts:
            found = [part.wanted for _, _, part in self.parts]
            return Wanted(
                frozenset().union(*(wanted.names for wanted in found)),
                frozenset().union(*(wanted.required for wanted in found)),
                any(wanted.takes_all for wanted in found),
            )
        return wanted_fields(self.function) if self.extract is None else NOTHING


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


def weighted_sum(parts: Sequence[tuple[str, float, Reward]]) -> Reward:
    """Return the reward sum_i w_i R_i of several rewards by name.

    Each R_i is logged under its name, and what else a function of the user's own returns as `NAME_KEY`. Format and
    answer are those of the first part that has a format, else of the first part. So is what depends on the format.

    >>> half = Reward(lambda response, truth: 0.5)
    >>> both = weighted_sum([("right", 1.0, REWARD_FUNCTIONS["question_only"]), ("half", 0.25, half)])
    >>> grade_response("\\\\boxed{2}", "2", both).rewards["reward"]
    1.125
    """
    leading = next((part for _, _, part in parts if part.extract), parts[0][2])
    return Reward(leading.function, leading.extract, leading.write_response, leading.prompt, parts=tuple(parts))


def grade_responses(
    responses: Sequence[str],
    ground_truths: Sequence[str],
    reward_fn: AnyReward,
    fields: Sequence[Mapping[str, Any]] | None = None,
) -> list[Grade]:
    """Grade a batch of responses, and return the grades in their order; see `grade_response`.

    Raises:
        RewardError: a function of the user's own failed for every response.
    """
    reward = as_reward(reward_fn)
    rows = zip(responses, ground_truths, fields or [{}] * len(responses), strict=True)
    grades = [grade_response(response, truth, reward, given) for response, truth, given in rows]
    report_problems(grades)
    return grades


def report_problems(grades: Sequence[Grade]) -> None:
    """Say what a function of the user's own did wrong in a batch.

    Raises:
        RewardError: it failed for every response.
    """
    problems = [grade.problem for grade in grades if grade.problem]
    if problems and len(problems) == len(grades):
        raise RewardError(f"{problems[0]} (so did each of {len(grades)} responses)" if grades[1:] else problems[0])
    for problem in problems:
        say_once(problem)


def grade_response(
    response: str, ground_truth: str, reward_fn: AnyReward, fields: Mapping[str, Any] | None = None
) -> Grade:
    """Grade one response; whatever text it holds, nothing is raised for it. Any thread may call this.

    A function of your own may return a number, or a dictionary that needs `reward` only. `answer_reward` is then taken
    to equal it, and `format_reward` to be 1. If it fails, the response has rewards of 0, and the grade says why.

    Args:
        response: the text that was sampled.
        ground_truth: the right answer.
        reward_fn: the reward.
        fields: of the record, for functions that ask for some.

    >>> grade_response("7", "8", lambda response, truth: -abs(float(response) - float(truth))).rewards
    {'reward': -1.0, 'answer_reward': -1.0, 'format_reward': 1.0}
    """
    reward = as_reward(reward_fn)
    if reward.parts:
        return _grade_sum(response, ground_truth, reward, fields or {})
    if reward.extract is not None:
        return grade_answer(reward.extract(response), ground_truth)
    try:
        return Grade(call_reward(reward.function, response, ground_truth, fields or {}, reward.max_seconds))
    except CallError as error:
        return Grade(dict.fromkeys(USUAL_KEYS, 0.0), error.kind, str(error))


def grade_answer(answer: str | None, ground_truth: Any) -> Grade:
    """Grade an extracted answer; None means that the response does not keep the format.

    >>> grade_answer("0.5", r"\\frac{1}{2}")
    Grade(rewards={'format_reward': 1.0, 'answer_reward': 1.0, 'reward': 1.0}, failure=None, problem=None)
    """
    if answer is None:
        return Grade(dict.fromkeys(USUAL_KEYS, 0.0))
    answer, truths = clean_ground_truth(answer), read_alternatives(clean_ground_truth(ground_truth))
    correct, failure = 0.0, None
    for truth in truths:
        try:
            if answers_match(answer, truth):
                correct, failure = 1.0, None
                break
        except GradingError as error:
            failure = failure or str(error)
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
        and grade_answer(reward.extract(reward.write_response("", text)), text).rewards["answer_reward"] == 1
        for text in read_alternatives(ground_truth)
    )


def own_means(rewards: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each value that a reward returns beside the usual three, over the responses that have it.

    >>> own_means([{"reward": 1.0, "short": 1.0}, {"reward": 0.0, "short": 0.5}, {"reward": 0.0}])
    {'short': 0.75}
    """
    names = dict.fromkeys(name for of_response in rewards for name in of_response if name not in USUAL_KEYS)
    values = {name: [of_response[name] for of_response in rewards if name in of_response] for name in names}
    return {name: sum(of_name) / len(of_name) for name, of_name in values.items()}


def _grade_sum(response: str, ground_truth: str, reward: Reward, fields: Mapping[str, Any]) -> Grade:
    """Grade a response by each part of a weighted sum. If a part fails, the whole response does."""
    grades = [grade_response(response, ground_truth, part, fields) for _, _, part in reward.parts]
    if broken := next((grade for grade in grades if grade.problem), None):
        return broken
    leading = grades[next((index for index, (_, _, part) in enumerate(reward.parts) if part.extract), 0)].rewards
    rewards = {"format_reward": leading["format_reward"], "answer_reward": leading["answer_reward"]}
    rewards["reward"] = sum(
        weight * grade.rewards["reward"] for (_, weight, _), grade in zip(reward.parts, grades, strict=True)
    )
    for (name, _, _), grade in zip(reward.parts, grades, strict=True):
        rewards[name] = grade.rewards["reward"]
        rewards |= {f"{name}_{key}": value for key, value in grade.rewards.items() if key not in USUAL_KEYS}
    return Grade(rewards, next((grade.failure for grade in grades if grade.failure), None))


def read_alternatives(ground_truth: str) -> list[str]:
    """Return the answers that a cleaned ground truth allows: one, or those of a JSON list of texts."""
    try:
        texts = json.loads(ground_truth) if ground_truth.startswith('["') else None
    except (ValueError, RecursionError):
        texts = None
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else [ground_truth]
