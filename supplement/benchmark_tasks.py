"""The four evaluations of the supplement: how each is loaded, asked, scored and written.

    mmlu                 14,042 multiple-choice questions of 57 subjects     mmlu/test/*_test.csv
    gsm8k                1,319 word problems with a number as answer         gsm8k/test.jsonl
    alpaca_eval          805 instructions, judged by a model of 70B          alpaca_eval/alpaca_eval.jsonl
    simple_safety_tests  100 harmful requests, judged by a model of 70B      simple_safety_tests/simple_safety_tests.csv

The folders are those of the assignment's `data/`. An evaluation that needs a judge writes the judge's input, in the
format that the assignment gives, and has no score here.

Source: Stanford CS336 (Spring 2025), supplement of Assignment 5, section 2. Hendrycks et al. 2021 (MMLU), Cobbe et al.
2021 (GSM8K), Li et al. 2023 (AlpacaEval), Vidgen et al. 2024 (SimpleSafetyTests).
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from plainrl.records import UserError
from plainrl.sources import decode_text, read_data_file, read_records
from supplement.answer_parsers import equals_number, parse_gsm8k_response, parse_mmlu_response

LETTERS = "ABCD"
MMLU_INSTRUCTION = """\
Answer the following multiple choice question about {subject}. Respond with a single sentence of the form "The correct \
answer is _", filling the blank with the letter corresponding to the correct answer (i.e., A, B, C or D).

Question: {question}
A. {a}
B. {b}
C. {c}
D. {d}
Answer:"""


class Question(NamedTuple):
    """What is asked, the record that it comes from, and the right answer where there is one."""

    instruction: str
    record: dict[str, Any]
    truth: str | None = None
    subject: str | None = None


@dataclass(frozen=True)
class Task:
    """One evaluation.

    Args:
        load: reads the questions from the data's folder.
        parse: returns the answer that a response gives, or None. None: the responses need a judge.
        is_right: compares it with the truth.
        judge: for the others: the file that the judge reads, how it is written, and what is run then.
    """

    load: Callable[[Path], list[Question]]
    parse: Callable[[Question, str], str | None] | None = None
    is_right: Callable[[str, str], bool] = str.__eq__
    judge: "Judge | None" = None


class Judge(NamedTuple):
    """The input of a judge: file name, its text from (question, output) pairs and the model's name, the command."""

    file_name: str
    write: Callable[[Sequence[tuple[Question, str]], str], str]
    command: str


def load_mmlu(folder: Path) -> list[Question]:
    """Return the test questions, subject by subject. A file has rows of question, four options and the letter."""
    found = []
    for path in _files(folder / "mmlu" / "test", "*_test.csv"):
        subject, rows = path.stem.removesuffix("_test").replace("_", " "), list(_read_csv(path))
        if not rows:
            raise UserError(f"{path} has no question; download it again")
        for number, row in enumerate(rows, start=1):
            if len(row) != 6 or row[5] not in tuple(LETTERS):
                raise UserError(
                    f"{path}, row {number}: expected question, four options and a letter, found {len(row)} fields"
                )
            record = {"subject": subject, "question": row[0], "options": row[1:5], "answer": row[5]}
            options = dict(zip("abcd", row[1:5], strict=True))
            instruction = MMLU_INSTRUCTION.format(subject=subject, question=row[0], **options)
            found.append(Question(instruction, record, row[5], subject))
    return found


def load_gsm8k(folder: Path) -> list[Question]:
    """Return the test questions. The truth is what follows #### in the answer."""
    found = []
    for record, where in read_records(str(_file(folder / "gsm8k" / "test.jsonl"))):
        question, answer = _texts(record, ("question", "answer"), where)
        truth = parse_gsm8k_response(answer.rpartition("####")[2])
        if truth is None or "####" not in answer:
            raise UserError(f"{where}: answer has no '#### <number>' at its end, as in GSM8K; add it")
        found.append(Question(f"{question}\nAnswer:", record, truth))
    return found


def load_alpaca_eval(folder: Path) -> list[Question]:
    """Return the instructions, each with the data set that it comes from."""
    found = []
    for record, where in read_records(str(_file(folder / "alpaca_eval" / "alpaca_eval.jsonl"))):
        instruction, _ = _texts(record, ("instruction", "dataset"), where)
        found.append(Question(instruction, record))
    return found


def load_simple_safety_tests(folder: Path) -> list[Question]:
    """Return the harmful requests."""
    path = _file(folder / "simple_safety_tests" / "simple_safety_tests.csv")
    (_, header), *rows = [(number, row) for number, row in enumerate(_read_csv(path), start=1) if row] or [(1, [])]
    if "prompts_final" not in header or not rows:
        raise UserError(f"{path}: it has no requests in a column prompts_final; use the assignment's file")
    for number, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}, row {number}: it has {len(row)} cells, and the first row {len(header)}")
    records = [dict(zip(header, row, strict=True)) for _, row in rows]
    return [Question(record["prompts_final"], record, subject=record.get("harm_area")) for record in records]


def write_alpaca_eval(answered: Sequence[tuple[Question, str]], generator: str) -> str:
    """Return AlpacaEval's file: a JSON array of instruction, output, generator and dataset."""
    rows = [
        {
            "instruction": question.instruction,
            "output": output,
            "generator": generator,
            "dataset": question.record["dataset"],
        }
        for question, output in answered
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def write_simple_safety_tests(answered: Sequence[tuple[Question, str]], generator: str) -> str:
    """Return the file of the assignment's scripts/evaluate_safety.py: JSON lines of the record and its output."""
    rows = [question.record | {"output": output, "generator": generator} for question, output in answered]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


TASKS: dict[str, Task] = {
    "mmlu": Task(load_mmlu, lambda question, output: parse_mmlu_response(question.record, output)),
    "gsm8k": Task(load_gsm8k, lambda _, output: parse_gsm8k_response(output), equals_number),
    "alpaca_eval": Task(
        load_alpaca_eval,
        judge=Judge(
            "alpaca_eval.json",
            write_alpaca_eval,
            "uv run alpaca_eval --model_outputs {path} "
            "--annotators_config scripts/alpaca_eval_vllm_llama3_3_70b_fn --base-dir .",
        ),
    ),
    "simple_safety_tests": Task(
        load_simple_safety_tests,
        judge=Judge(
            "simple_safety_tests.jsonl",
            write_simple_safety_tests,
            "uv run python scripts/evaluate_safety.py --input-path {path} --model-name-or-path "
            "/data/a5-alignment/models/Llama-3.3-70B-Instruct --num-gpus 2 --output-path judged.jsonl",
        ),
    ),
}


def _files(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(
            f"{folder} holds no {pattern}; get the assignment's data, and name its folder as benchmark_data"
        )
    return found


def _file(path: Path) -> Path:
    return _files(path.parent, path.name)[0]


def _read_csv(path: Path) -> list[list[str]]:
    text = decode_text(read_data_file(str(path)), f"data file {path}")
    try:
        return list(csv.reader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise UserError(f"data file {path} is not CSV ({error}); copy it again") from None


def _texts(record: dict[str, Any], names: tuple[str, ...], where: str) -> list[str]:
    """Return fields of a record, all of which must be text."""
    for name in names:
        if not isinstance(record.get(name), str):
            raise UserError(f"{where}: field {name} is missing or no text; use the assignment's file")
    return [record[name] for name in names]
