"""Graded responses, read back from a run's samples/, and those that are chosen to be shown.

samples/eval_STEP.jsonl         all responses of an evaluation; eval_all_ those of the last, on all questions
samples/rollouts_STEP.jsonl     the first groups of a rollout batch

A group is the responses to one question of one file.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plainrl.prompting import load_prompt_template
from plainrl.records import UserError

LONGEST_PRINTED = 600  # characters of a text that is printed
LONGEST_SHOWN = 20_000  # characters of a text in a page
SHOWN_BYTES = 3_200_000  # of responses in a page, as JSON
ROLLOUTS = "rollouts"
PRINTED_KINDS = {
    "right": lambda sample: sample["answer_reward"] == 1,
    "wrong": lambda sample: sample["answer_reward"] != 1,
}
NEEDED = ("prompt", "response", "answer_reward")  # a line without these is damaged
Sample = Mapping[str, Any]


class Template(NamedTuple):
    """What stands before and after the question in each prompt of a run; both are empty if it is not known."""

    before: str = ""
    after: str = ""

    def question_in(self, prompt: str) -> str:
        """Return the question in a prompt; the whole prompt if it is not made from this template.

        >>> Template("Q: ", "\\nA:").question_in("Q: 1 + 1?\\nA:")
        '1 + 1?'
        """
        if prompt.startswith(self.before) and prompt.endswith(self.after):
            return prompt[len(self.before) : len(prompt) - len(self.after)]
        return prompt


def read_template(name_or_path: str) -> Template:
    """Return the template of a run's prompts. It is empty if the file is gone, or holds the question twice."""
    try:
        parts = load_prompt_template(name_or_path).split("{question}")
    except UserError:
        return Template()
    return Template(*parts) if len(parts) == 2 else Template()


class SampleFile(NamedTuple):
    """A file of samples/: what kind of responses it holds, and the step after which they were sampled."""

    kind: str
    step: int
    path: Path


def list_sample_files(folder: Path) -> list[SampleFile]:
    """Return the files in a run's samples/, by kind and step. Those of a further validation set are `eval/NAME`."""
    files = []
    for path in (folder / "samples").glob("**/*.jsonl"):
        if match := re.fullmatch(r"(.+)_(\d+)\.jsonl", path.name):
            names = path.parent.relative_to(folder / "samples").parts
            files.append(SampleFile("/".join([match[1], *names]), int(match[2]), path))
    return sorted(files)


def read_samples(path: Path) -> tuple[list[Sample], int]:
    """Return the responses in a file of samples/, and how many lines of it are damaged.

    A line may be damaged if the process was killed while it wrote.
    """
    samples: list[Sample] = []
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(sample, dict) and all(key in sample for key in NEEDED):
            samples.append(sample)
    return samples, len(lines) - len(samples)


def count_lines(path: Path) -> int:
    """Return how many lines a file of samples has."""
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def split_into_groups(samples: Sequence[Sample], kind: str, group_size: int) -> list[list[int]]:
    """Return the indices of the samples of each group. Those of a group stand next to each other.

    Rollouts have `group_size` responses to each question. Evaluations number their questions. After a resume with
    another size, or a damaged line, no group has responses to two questions.
    """
    groups: list[list[int]] = []
    previous: Any = None
    for index, sample in enumerate(samples):
        key = (sample["prompt"], index // group_size) if kind == ROLLOUTS else sample.get("question", sample["prompt"])
        if not groups or key != previous:
            groups.append([])
        groups[-1].append(index)
        previous = key
    return groups


def choose_printed(samples: Sequence[Sample], number: int) -> dict[str, list[int]]:
    """Return the indices of the first right and the first wrong responses: at most `number` of each.

    >>> choose_printed([{"answer_reward": 0.0}, {"answer_reward": 1.0}, {"answer_reward": 0.0}], 1)
    {'right': [1], 'wrong': [0]}
    """
    return {
        kind: [index for index, sample in enumerate(samples) if belongs(sample)][:number]
        for kind, belongs in PRINTED_KINDS.items()
    }


def describe_examples(samples: Sequence[Sample], number: int, template: Template) -> Iterator[str]:
    """Yield what is printed of an evaluation: a text of several lines for each of its first right and wrong responses.

    A long text is cut in its middle, and what a terminal would take for a command is shown as an escape.
    """
    for kind, indices in choose_printed(samples, number).items():
        for index in indices:
            sample = samples[index]
            notes = [f"{sample.get('response_length', '?')} tokens"]
            notes += ["cut"] if sample.get("finish_reason") == "length" else []
            texts = {
                "question": template.question_in(str(sample["prompt"])),
                "response": str(sample["response"]),
                "truth": str(sample.get("ground_truth")),
            }
            lines = [f"    {name:<8}  {_indented(text)}" for name, text in texts.items()]
            yield "\n".join([f"  {kind} ({', '.join(notes)})", *lines])


def coarse_to_fine(count: int) -> list[int]:
    """Return the places 0 ... count - 1, the last and the first before those between, and so on by halves.

    >>> coarse_to_fine(5)
    [4, 0, 2, 1, 3]
    """
    order = dict.fromkeys([count - 1, 0] if count else [])
    stride = max(count // 2, 1)
    while len(order) < count:
        order |= dict.fromkeys(range(0, count, stride))
        stride = max(stride // 2, 1)
    return list(order)


def shorten(text: str, longest: int) -> str:
    """Return a text, with its middle left out and counted if it is longer.

    >>> shorten("abcdefgh", 4)
    'ab [... 4 characters ...] gh'
    """
    half = longest // 2
    if len(text) <= longest:
        return text
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def printable(text: str) -> str:
    r"""Return a text with escapes for what a terminal would take for a command; line breaks stay.

    >>> printable("a\x1b[2J\nb")
    'a\\x1b[2J\nb'
    """
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )


def _indented(text: str) -> str:
    return printable(shorten(text.strip(), LONGEST_PRINTED)).replace("\n", "\n" + " " * 14)
