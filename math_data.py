"""Questions, worked traces and prompts: from files, from a hub, or made here (embedded arithmetic).

Files are told apart by content, not by their ending: JSON lines, one JSON array, or Parquet, with
records in one of these layouts.

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from run_config import EMBEDDED_DATA, RunConfig, SFTConfig, TrainConfig, UserError, first_line

PROMPTS_FOLDER = Path(__file__).parent / "prompts"
LAYOUTS = (
    ("problem", "reasoning_trace", "expected_answer"),
    ("problem", "expected_answer"),
    ("problem", "answer"),
    ("prompt", "response"),
    ("question", "answer"),
)
NUM_ARITHMETIC_TRAIN = 8192
NUM_ARITHMETIC_VALIDATION = 1024
VALIDATION_SUBSET_SEED = 20250


class Example(NamedTuple):
    """One question, the prompt that asks it, its ground truth and, where there is one, a response to imitate."""

    question: str
    prompt: str
    ground_truth: str | None
    response: str | None
    source: str


@dataclass(frozen=True)
class Record:
    """One record of a data set before prompt and answer format are applied.

    `prompt`, where it is set, is already written out; `response` is complete, `reasoning` still lacks the answer,
    which is `wrong_answer` where that is set, else the ground truth.
    """

    source: str
    question: str
    ground_truth: str | None
    prompt: str | None = None
    reasoning: str | None = None
    wrong_answer: str | None = None
    response: str | None = None


def load_sft_examples(config: SFTConfig) -> list[Example]:
    """Return the training examples that have a response, exact repetitions merged.

    Raises:
        UserError: the data cannot be read, or no record has a response.
    """
    examples = load_examples(config.train_data, config, "train", config.arithmetic_corrupt_fraction)
    examples = keep(examples, lambda example: bool(example.response), "have no response to imitate", config.train_data)
    return list({(example.prompt, example.response): example for example in examples}.values())


def load_validation_set(config: RunConfig) -> list[Example]:
    """Return all validation questions.

    Raises:
        UserError: the data cannot be read, or lacks ground truths.
    """
    examples = load_examples(config.validation_data, config, split="validation")
    without_answer = [example.source for example in examples if example.ground_truth is None]
    if without_answer:
        raise UserError(
            f"validation_data = {config.validation_data}: {len(without_answer)} of {len(examples)} questions have no "
            f"answer, the first at {without_answer[0]}; use data with answers"
        )
    return examples


def validation_subset(validation_set: list[Example], config: RunConfig) -> list[Example]:
    """Return the fixed subset for evaluations during training: the same questions whatever the run's seed.

    Raises:
        UserError: there are fewer questions than asked for.
    """
    if config.num_eval_examples == "all":
        return validation_set
    if config.num_eval_examples > len(validation_set):
        raise UserError(
            f"num_eval_examples = {config.num_eval_examples}: {config.validation_data} has {len(validation_set)} "
            f"questions; ask for at most that, or all"
        )
    return _draw_subset(validation_set, config.num_eval_examples)


def final_validation_subset(validation_set: list[Example], config: TrainConfig) -> list[Example]:
    """Return the fixed subset for the evaluation at the end of training; the whole set if it is smaller."""
    if config.num_final_eval_examples == "all":
        return validation_set
    return _draw_subset(validation_set, min(config.num_final_eval_examples, len(validation_set)))


def keep(examples: list[Example], is_kept: Callable[[Example], bool], reason: str, source: str) -> list[Example]:
    """Return the training examples that may be used, and print how many were left out, for what reason.

    Raises:
        UserError: none may be used.
    """
    kept, left_out = [], []
    for example in examples:
        (kept if is_kept(example) else left_out).append(example)
    if left_out:
        message = f"{len(left_out)} of {len(examples)} training examples {reason}, the first at {left_out[0].source}"
        if not kept:
            raise UserError(f"train_data = {source}: {message}; use other data")
        print(f"left out: {message}")
    return kept


def hold_out(examples: list[Example], validation_set: Sequence[Example], config: RunConfig) -> list[Example]:
    """Return the training examples whose question is not in the validation set."""
    held_out = {text for example in validation_set for text in (example.question, example.prompt)}
    return keep(
        examples,
        lambda example: not {example.question, example.prompt} & held_out,
        f"have their question in {config.validation_data}",
        config.train_data,
    )


def keep_answered(examples: list[Example], config: RunConfig) -> list[Example]:
    """Return the training examples that have an answer to grade against (of MATH's 7,500 two have none)."""
    return keep(examples, lambda example: example.ground_truth is not None, "have no answer", config.train_data)


def load_examples(
    source: str, config: RunConfig, split: Literal["train", "validation"], corrupt_fraction: float = 0.0
) -> list[Example]:
    """Return all examples of a data source, prompts filled in and responses written out.

    `corrupt_fraction` is the share of embedded traces that are made wrong; see `corrupt_some`.
    """
    if source == EMBEDDED_DATA:
        records = arithmetic_records(split, config.arithmetic_terms, config.arithmetic_max_term)
        records = corrupt_some(records, corrupt_fraction)
    else:
        records = [parse_record(values, where) for values, where in read_records(source)]
    if not records:
        raise UserError(f"{source} has no records: give a file with at least one")
    template = load_prompt_template(config.prompt)
    return [
        Example(
            question=record.question,
            prompt=record.prompt if record.prompt is not None else fill_prompt(template, record.question),
            ground_truth=record.ground_truth,
            response=record.response
            or format_response(record.reasoning, record.wrong_answer or record.ground_truth, config.reward),
            source=record.source,
        )
        for record in records
    ]


def load_prompt_template(name_or_path: str) -> str:
    """Return a prompt template: prompts/<name>.prompt, or the file at a path.

    Raises:
        UserError: no such template, or it lacks the place holder `{question}`.
    """
    path = PROMPTS_FOLDER / f"{name_or_path}.prompt"
    if not _exists(path):
        path = Path(name_or_path)
    if not _exists(path) or path.is_dir():
        names = ", ".join(sorted(file.stem for file in PROMPTS_FOLDER.glob("*.prompt")))
        raise UserError(f"prompt = {name_or_path}: no such template; use {names}, or the path of a file")
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt = {name_or_path}: cannot read {path} as UTF-8 text ({error})") from None
    if "{question}" not in template:
        raise UserError(f"prompt = {name_or_path}: {path} lacks the place holder {{question}}; add it")
    return template


def fill_prompt(template: str, question: str) -> str:
    r"""Put a question into a template, braces and all.

    >>> fill_prompt("User: {question}", r"What is \frac{1}{2}?")
    'User: What is \\frac{1}{2}?'
    """
    return template.replace("{question}", question)


def format_response(
    reasoning: str | None, answer: str | None, reward: Literal["r1_zero", "question_only"]
) -> str | None:
    r"""Write reasoning and answer in the format that a reward function asks for.

    >>> format_response("1 + 2 = 3.", "3", "r1_zero")
    ' 1 + 2 = 3. </think> <answer> 3 </answer>'
    >>> format_response("1 + 2 = 3.", "3", "question_only")
    ' 1 + 2 = 3. The answer is \\boxed{3}.'
    """
    if reasoning is None or answer is None:
        return None
    if reward == "r1_zero":
        return f" {reasoning} </think> <answer> {answer} </answer>"
    return f" {reasoning} The answer is \\boxed{{{answer}}}."


def read_records(source: str) -> Iterable[tuple[dict[str, Any], str]]:
    """Yield the records of a file or hub data set, each with where it stands (file:line).

    Raises:
        UserError: missing or empty file, broken JSON (file and line), a record that is no object.
    """
    path = Path(source)
    if not _exists(path):
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
        except Exception as error:  # the library raises many kinds for a damaged file
            raise UserError(f"data file {source} starts like Parquet but cannot be read ({error}); mend it") from error
        yield from ((dict(row), f"{source}, row {index}") for index, row in enumerate(rows, start=1))
        return
    yield from _read_json(path)


def parse_record(values: dict[str, Any], where: str) -> Record:
    """Return a record in any of the layouts above.

    Raises:
        UserError: the fields fit no layout, or a needed one is not text.
    """
    layout = next((layout for layout in LAYOUTS if all(name in values for name in layout)), None)
    if layout is None:
        raise UserError(
            f"{where}: fields {sorted(values)} fit no known layout; needed is one of "
            + ", ".join("+".join(layout) for layout in LAYOUTS)
        )
    answer_name = {"problem": layout[-1], "prompt": "ground_truth"}.get(layout[0], "")
    answer = values.get(answer_name)  # of MATH's 7,500 training records two have an empty one
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
            raise UserError(f"{where}: answer has no '#### <number>' at its end, as GSM8K has")
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


def arithmetic_records(
    split: Literal["train", "validation"], num_terms: tuple[int, int], max_term: int
) -> list[Record]:
    """Return sums and differences of small numbers with worked traces.

    The same settings always give the same questions. Which split a question belongs to follows from a
    hash of its text, so that training and validation share none: a quarter of all distinct questions may be
    held out. That gives the smallest task in use (2 or 3 terms up to 10) 3,154 training and 1,024 validation
    questions.

    Args:
        split: train (at most 8,192 questions) or validation (at most 1,024).
        num_terms: fewest and most terms of a question.
        max_term: largest term; the smallest is 1. Results may be negative.
    """
    generator = random.Random("embedded arithmetic")
    wanted = NUM_ARITHMETIC_TRAIN if split == "train" else NUM_ARITHMETIC_VALIDATION
    records: dict[str, Record] = {}
    for _ in range(40 * wanted):  # bounded: small settings have fewer distinct questions than wanted
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
    return list(records.values())


def corrupt_some(records: Sequence[Record], fraction: float) -> list[Record]:
    """Return arithmetic records, about this share of them with a wrong last sum and answer.

    Which ones, and by how much (1 to 9, up or down), follows from a hash of the question alone: a larger share
    contains the smaller one, and the same question is always wrong in the same way. The ground truth stays right.

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


def epoch_order(num_examples: int, num_draws: int, seed: int) -> list[int]:
    """Return indices that run through all examples in a new random order each epoch.

    Epochs follow each other without a gap, so that no example is left out at an epoch's end.

    >>> sorted(epoch_order(num_examples=4, num_draws=8, seed=0)[:4])
    [0, 1, 2, 3]
    """
    order: list[int] = []
    epoch = 0
    while len(order) < num_draws:
        permutation = list(range(num_examples))
        random.Random(f"{seed} epoch {epoch}").shuffle(permutation)
        order += permutation
        epoch += 1
    return order[:num_draws]


def describe_sources(examples: Sequence[Example]) -> str:
    """Return where the first few examples come from, in one line, for messages."""
    named = ", ".join(example.source for example in examples[:8])
    return named if len(examples) <= 8 else f"{named} and {len(examples) - 8} more"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a path: somebody gave a text
        return False


def _draw_subset(validation_set: list[Example], num_examples: int) -> list[Example]:
    chosen = random.Random(VALIDATION_SUBSET_SEED).sample(range(len(validation_set)), num_examples)
    return [validation_set[index] for index in sorted(chosen)]


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
            raise UserError(f"{path}, line {error.lineno}: broken JSON array ({error.msg}); mend that line") from None
    else:
        items = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    items.append((json.loads(line), f"{path}, line {number}"))
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: broken JSON ({error.msg}); mend that line") from None
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
    except Exception as error:  # the library raises many kinds: unknown name, unknown split, no network
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
