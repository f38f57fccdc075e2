"""Prompts, ground truths and responses to imitate, written out from records."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from plainrl.grading.rewards import Reward, clean_ground_truth, is_gradable, read_alternatives
from plainrl.layouts import Record
from plainrl.records import UserError
from plainrl.shared_config import RunConfig
from plainrl.sources import decode_text, path_exists

PROMPTS_FOLDER = Path(__file__).parent / "prompts"


def read_answers(records: Sequence[Record], reward: Reward, source: str) -> list[tuple[str | None, str | None]]:
    r"""Return of each record what responses are graded against, and the answer that a response to imitate gives.

    The first is the text of the data, which the grader reads: `\boxed{5}`. The second is the bare answer: `5`. Both are
    None if no response can equal it. Several right answers are a JSON list of texts.

    Args:
        records: of a data set.
        reward: the reward function. If it is the user's own, it gets the answers as they are.
        source: the data set, for the message that counts what no response can equal, and shows three.
    """

    @cache
    def bare(truth: str) -> str | None:
        answer = truth if reward.extract is None else clean_ground_truth(truth)
        return answer if is_gradable(answer, reward) else None

    found: list[tuple[str | None, str | None]] = []
    failing: list[Record] = []
    for record in records:
        truths = [record.ground_truth, *record.alternatives] if record.ground_truth else []
        if reward.extract is not None:  # a text may be a list of alternatives, too
            truths = [answer for truth in truths for answer in read_alternatives(truth)]
        answers = [answer for truth in truths if (answer := bare(truth))]
        text = json.dumps(answers, ensure_ascii=False) if len(truths) > 1 else record.ground_truth
        found.append((text, answers[0]) if answers else (None, None))
        if len(answers) < len(truths):  # some of the alternatives, or all
            failing.append(record)
    if failing:
        shown = "; ".join(f"{record.source}: {(record.ground_truth or '')[:60]!r}" for record in failing[:3])
        print(f"no response can equal answers in {len(failing)} of {len(records)} records of {source}, such as {shown}")
    return found


def load_prompt_template(name_or_path: str) -> str:
    """Return a prompt template: prompts/<name>.prompt, or the file at a path. A line ends in a newline alone.

    Raises:
        UserError: there is no such template, it is not UTF-8, or it lacks the place holder `{question}`.
    """
    path = PROMPTS_FOLDER / f"{name_or_path}.prompt"
    if not path_exists(path):
        path = Path(name_or_path)
    if not path_exists(path) or not path.is_file():
        names = ", ".join(sorted(file.stem for file in PROMPTS_FOLDER.glob("*.prompt")))
        raise UserError(f"prompt = {name_or_path}: no such template; use {names}, or the path of a file")
    try:
        template = decode_text(path.read_bytes(), f"prompt = {name_or_path}: {path}")
    except OSError as error:
        raise UserError(f"prompt = {name_or_path}: {path} cannot be read ({error.strerror})") from None
    if "{question}" not in template:
        raise UserError(f"prompt = {name_or_path}: {path} lacks the place holder {{question}}; add it")
    return template


def fill_prompt(template: str, question: str) -> str:
    r"""Put a question into a template. Other braces in template and question stay as they are.

    >>> fill_prompt("User: {question}", r"What is \frac{1}{2}?")
    'User: What is \\frac{1}{2}?'
    """
    return template.replace("{question}", question)


def write_prompt(record: Record, template: str, config: RunConfig) -> str:
    """Return a record's own prompt, or its question in the template. `fill_prompts` takes the template for all."""
    if record.prompt is None or config.fill_prompts:
        return fill_prompt(template, record.question)
    return record.prompt


def format_response(reasoning: str | None, answer: str | None, reward: Reward) -> str | None:
    r"""Write reasoning and answer in the format that a reward function wants. If one is missing, return None.

    Tags `<think>` and `</think>` of the reasoning's own are left out, as the format has its own.

    >>> from plainrl.grading.rewards import REWARD_FUNCTIONS
    >>> format_response("<think>\n1 + 1 = 2.\n</think>\n\nSo it is 2.", "2", REWARD_FUNCTIONS["r1_zero"])
    ' 1 + 1 = 2.\nSo it is 2. </think> <answer> 2 </answer>'
    """
    if reasoning is None or answer is None:
        return None
    if "think>" in reasoning:
        reasoning = re.sub(r"\s*</?think>\s*", "\n", reasoning).strip()
    return reward.write_response(reasoning, answer)
