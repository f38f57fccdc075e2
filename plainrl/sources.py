"""Read or make questions: from files, hub data sets, and the embedded arithmetic.

A file holds JSON lines, one JSON array, or Parquet. Its content decides which, not its name. Each record has one of
these layouts.

    {"problem", "reasoning_trace", "expected_answer", ...}   SFT traces (already end in </answer>)
    {"problem", "expected_answer"}                           MATH validation
    {"problem", "answer"[, "solution"], ...}                 MATH
    {"prompt", "response"[, "ground_truth"]}                 SFT, prompt already written out
    {"question", "answer": "... #### 72"}                    GSM8K
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from plainrl.config import EMBEDDED_DATA
from plainrl.records import UserError, first_line

LAYOUTS = (
    ("problem", "reasoning_trace", "expected_answer"),
    ("problem", "expected_answer"),
    ("problem", "answer"),
    ("prompt", "response"),
    ("question", "answer"),
)
NUM_ARITHMETIC_TRAIN = 8192
NUM_ARITHMETIC_VALIDATION = 1024


@dataclass(frozen=True)
class Record:
    """One record of a data set, before prompt and answer format are applied.

    Args:
        source: where the record stands, for messages.
        question: the question alone.
        ground_truth: the right answer, if known.
        prompt: the prompt, already written out. If it is None, a template is filled in.
        reasoning: a solution that still lacks the final answer.
        wrong_answer: the final answer to write after `reasoning`. If it is None, the ground truth is used.
        response: a complete response.
    """

    source: str
    question: str
    ground_truth: str | None
    prompt: str | None = None
    reasoning: str | None = None
    wrong_answer: str | None = None
    response: str | None = None


def read_records(source: str) -> Iterable[tuple[dict[str, Any], str]]:
    """Yield the records of a file or hub data set, each with the place where it stands (file and line).

    Args:
        source: path of a file, or `owner/name[/configuration]:split` of a hub data set.

    Raises:
        UserError: the file is missing or empty, its JSON is broken (the message names the line), or a record is not an
            object.
    """
    path = Path(source)
    if not path_exists(path):
        if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?:[\w.-]+", source):
            yield from _read_hub(source)
            return
        raise UserError(
            f"data file {source} does not exist; name a JSON, JSON lines or Parquet file, a hub data set as "
            f"owner/name:split or owner/name/configuration:split, or {EMBEDDED_DATA}"
        )
    if path.is_dir():
        raise UserError(f"data file {source} is a folder; name one file in it")
    try:
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
    except OSError as error:
        raise UserError(f"data file {source} cannot be read ({error.strerror})") from None
    if is_parquet:
        import datasets

        try:
            rows = datasets.Dataset.from_parquet(str(path))
        except Exception as error:  # of any type, because a damaged file makes the library raise many
            raise UserError(f"data file {source} starts like Parquet but cannot be read ({error}); fix it") from error
        yield from ((dict(row), f"{source}, row {index}") for index, row in enumerate(rows, start=1))
        return
    yield from _read_json(path)


def parse_record(values: dict[str, Any], where: str) -> Record:
    """Return a record in any of the layouts above.

    Raises:
        UserError: the fields fit no layout, or a required field is not text.
    """
    layout = next((layout for layout in LAYOUTS if all(name in values for name in layout)), None)
    if layout is None:
        raise UserError(
            f"{where}: fields {sorted(values)} fit no known layout; needed is one of "
            + ", ".join("+".join(layout) for layout in LAYOUTS)
        )
    answer_name = {"problem": layout[-1], "prompt": "ground_truth"}.get(layout[0], "")
    answer = values.get(answer_name)  # it is empty in two of MATH's 7,500 training records
    ground_truth = None if answer is None or not str(answer).strip() else _text(values, answer_name, where)
    fields = {name: _text(values, name, where) for name in layout if name != answer_name}
    if layout[0] == "prompt":
        return Record(
            source=where,
            question=fields["prompt"],
            prompt=fields["prompt"],
            response=fields["response"],
            ground_truth=ground_truth,
        )
    if layout[0] == "question":
        solution, separator, answer = fields["answer"].rpartition("####")
        if not separator:
            raise UserError(f"{where}: answer has no '#### <number>' at its end, as in GSM8K; add it")
        reasoning = " ".join(re.sub(r"<<[^<>]*>>", "", solution).split())
        truth = answer.strip().replace(",", "") or None
        return Record(source=where, question=fields["question"], reasoning=reasoning, ground_truth=truth)
    solution = values.get("solution")
    return Record(
        source=where,
        question=fields["problem"],
        reasoning=solution if isinstance(solution, str) else None,
        response=fields.get("reasoning_trace"),
        ground_truth=ground_truth,
    )


@cache
def arithmetic_records(
    split: Literal["train", "validation"], num_terms: tuple[int, int], max_term: int
) -> tuple[Record, ...]:
    """Return sums and differences of small numbers with worked traces.

    The same settings always give the same questions. A hash of its text decides which split a question belongs to, so
    that training and validation share none. A quarter of all distinct questions may be held out. The smallest task in
    use (2 or 3 terms up to 10) then has 3,154 training and 1,024 validation questions.

    Args:
        split: train (at most 8,192 questions) or validation (at most 1,024).
        num_terms: fewest and most terms of a question.
        max_term: largest term. The smallest is 1, and results may be negative.
    """
    generator = random.Random("embedded arithmetic")
    wanted = NUM_ARITHMETIC_TRAIN if split == "train" else NUM_ARITHMETIC_VALIDATION
    records: dict[str, Record] = {}
    for _ in range(40 * wanted):  # bounded, because small settings have fewer distinct questions than wanted
        terms = [generator.randint(1, max_term) for _ in range(generator.randint(*num_terms))]
        signs = [generator.choice("+-") for _ in terms[1:]]
        question, reasoning, answer = _work_out(terms, signs)
        is_validation = hashlib.sha256(question.encode()).digest()[0] < 64
        if is_validation == (split == "validation") and question not in records:
            records[question] = Record(
                source=f"{EMBEDDED_DATA} {split}, question {len(records) + 1}",
                question=question,
                reasoning=reasoning,
                ground_truth=str(answer),
            )
            if len(records) == wanted:
                break
    return tuple(records.values())


def corrupt_some(records: Sequence[Record], fraction: float) -> list[Record]:
    """Return arithmetic records, a share of them with a wrong last sum and answer. Their ground truths stay right.

    A hash of the question alone decides whether it is wrong, and by how much (1 to 9, up or down). A larger share
    therefore contains the smaller one, and the same question is always wrong in the same way.

    Args:
        records: from `arithmetic_records`.
        fraction: about which share becomes wrong, from 0 to 1.

    >>> record = Record(source="s", question="q", reasoning="1 + 2 = 3. 3 + 4 = 7.", ground_truth="7")
    >>> corrupt_some([record], 1.0)[0].reasoning
    '1 + 2 = 3. 3 + 4 = 15.'
    """
    chosen = []
    for record in records:
        digest = hashlib.sha256(f"corrupt {record.question}".encode()).digest()
        if int.from_bytes(digest[:4]) >= fraction * 2**32:
            chosen.append(record)
            continue
        offset = (1 + digest[4] % 9) * (1 if digest[5] % 2 else -1)
        wrong = str(int(record.ground_truth or "") + offset)
        reasoning = (record.reasoning or "").removesuffix(f"{record.ground_truth}.") + f"{wrong}."
        chosen.append(replace(record, reasoning=reasoning, wrong_answer=wrong))
    return chosen


def path_exists(path: Path) -> bool:
    """Return whether a path exists. It is false if a text is too long to be a path."""
    try:
        return path.exists()
    except OSError:  # the text is too long for a path
        return False


def _work_out(terms: list[int], signs: list[str]) -> tuple[str, str, int]:
    total, steps, expression = terms[0], [], str(terms[0])
    for sign, term in zip(signs, terms[1:], strict=True):
        result = total + term if sign == "+" else total - term
        steps.append(f"{total} {sign} {term} = {result}.")
        expression += f" {sign} {term}"
        total = result
    return f"What is {expression}?", " ".join(steps), total


def _read_json(path: Path) -> Iterable[tuple[dict[str, Any], str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text (byte {error.start}); convert it") from None
    if not text.strip():
        raise UserError(f"data file {path} is empty; give a file with at least one record")
    if text.lstrip().startswith("["):
        try:
            items = [(item, f"{path}, record {index}") for index, item in enumerate(json.loads(text), start=1)]
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: broken JSON array ({error.msg}); fix that line") from None
    else:
        items = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    items.append((json.loads(line), f"{path}, line {number}"))
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: broken JSON ({error.msg}); fix that line") from None
    for item, where in items:
        if not isinstance(item, dict):
            raise UserError(f"{where}: expected an object with fields, found {type(item).__name__}")
        yield item, where


def _read_hub(source: str) -> Iterable[tuple[dict[str, Any], str]]:
    import datasets

    address, split = source.split(":")
    owner, name, *configuration = address.split("/")
    try:
        rows = datasets.load_dataset(f"{owner}/{name}", *configuration, split=split)
    except Exception as error:  # of any type, because the library raises many: unknown name or split, no network
        raise UserError(
            f"data set {source} could not be loaded ({first_line(error)}); download it with "
            f"`uv run hf download {owner}/{name} --repo-type=dataset` or name a local file"
        ) from error
    yield from ((dict(row), f"{source}, row {index}") for index, row in enumerate(rows, start=1))


def _text(values: dict[str, Any], name: str, where: str) -> str:
    value = values[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: field {name} is {value!r}; expected text")
    return value
