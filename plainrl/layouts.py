r"""From a record of a data set, whatever its fields are called, to a question, an answer and a worked response.

    question   problem, question             a prompt template is filled in
               prompt                        a text is a prompt that is written out already
               messages, conversations       a chat: its question; `prompt` may be one, too
    answer     expected_answer, answer, ground_truth, or ground_truth inside reward_model
    response   reasoning_trace, response, completion      complete
               solution                      without the final answer in the format that the reward asks for

A record has a question, and an answer or a response. Of several fields the first that is filled counts. Names are the
same in capitals. Without an answer, that of a solution or a chat is what its last \boxed{} holds.

    layout            example
    SFT traces        {"problem", "reasoning_trace", "expected_answer"}
    MATH              {"problem", "answer", "solution"}, or {"problem", "solution": "... \boxed{5}"} (Hendrycks)
    AIME              {"ID", "Problem", "Solution", "Answer": 204}
    GSM8K             {"question", "answer": "... #### 72"}
    plain             {"question", "answer"}, {"prompt", "ground_truth"}, {"prompt", "response"}
    chat              {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}
    verl              {"prompt": [{"role": "user", ...}], "reward_model": {"ground_truth": "34"}}
"""

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from plainrl.records import UserError

CHATS = ("messages", "conversations")
QUESTIONS = ("problem", "question", "prompt", *CHATS)
ANSWERS = ("expected_answer", "answer", "ground_truth", "reward_model")
COMPLETE = ("reasoning_trace", "response", "completion")
RESPONSES = (*COMPLETE, "solution")
FIELDS = {*QUESTIONS, *ANSWERS, *RESPONSES}  # all that are ever looked at
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


class FieldNames(NamedTuple):
    """What the fields of a data set are called: `question_field`, `answer_field`, `trace_field` (empty: as above)."""

    question: str = ""
    answer: str = ""
    trace: str = ""


USUAL_NAMES = FieldNames()
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # the comma of 1,234, and not that of (3,4)


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
        alternatives: further answers that are right.
        has_system_message: whether it is a chat with a system message, which is not read.
        columns: all fields as they are, for reward functions that ask for them.
    """

    source: str
    question: str
    ground_truth: str | None
    prompt: str | None = None
    reasoning: str | None = None
    wrong_answer: str | None = None
    response: str | None = None
    alternatives: tuple[str, ...] = ()
    has_system_message: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict)


def parse_record(
    values: Mapping[str, Any], where: str, names: FieldNames = USUAL_NAMES, is_strict: bool = True
) -> Record:
    """Return a record in any of the layouts above.

    Args:
        values: its fields.
        where: where it stands, for messages.
        names: what the fields are called, where they are called otherwise.
        is_strict: whether fields that are named must be there. Otherwise a record with none of them is read as above,
            and `trace_field` alone may be missing.

    Raises:
        UserError: there is no question, or neither answer nor response, or a field is not what it should be.
    """
    fields = _rename(values, where, names, is_strict)
    question_name, answer_name, response_name = (
        _choose(fields, of_role) for of_role in (QUESTIONS, ANSWERS, RESPONSES)
    )
    chat = _as_chat(fields.get(question_name, None), question_name, where)
    if not question_name or not (answer_name or response_name or (chat and chat.response)):
        raise UserError(
            f"{where}: fields {sorted(values)} fit no known layout; needed are a question "
            f"({', '.join(QUESTIONS)}) and an answer or response ({', '.join((*ANSWERS, *RESPONSES))}); name others "
            "with question_field, answer_field and trace_field"
        )
    question = chat.question if chat else _text(fields[question_name], question_name, where)
    answers = _answers(fields.get(answer_name), answer_name, where)
    is_named = bool(names.trace) and names.trace in values
    label, is_needed = names.trace if is_named else response_name, (is_named and is_strict) or not answers
    response, reasoning = _read_response(fields, response_name, label, where, is_needed)
    if chat and not chat.question:
        raise UserError(f"{where}: field {question_name} has no question: a message with role user")
    if chat and chat.response and not (response or reasoning):
        response, reasoning = _split_chat_response(chat.response, has_answer=bool(answers))
    if question_name == "question" and len(answers) == 1 and "####" in answers[0]:  # GSM8K
        solution, _, answer = answers[0].rpartition("####")
        answers = [THOUSANDS.sub("", answer.strip())] if answer.strip() else []
        reasoning = " ".join(re.sub(r"<<[^<>]*>>", "", solution).split()) or reasoning
    elif not answers and reasoning:
        answers = [answer] if (answer := _final_answer(reasoning)) else []
    return Record(
        source=where,
        question=question,
        ground_truth=answers[0] if answers else None,
        prompt=question if question_name == "prompt" and not chat else None,
        reasoning=reasoning,
        response=response,
        alternatives=tuple(answers[1:]),
        has_system_message=bool(chat and chat.has_system),
        columns=values,
    )


def _rename(values: Mapping[str, Any], where: str, names: FieldNames, is_strict: bool) -> dict[str, Any]:
    """Return the fields under the names above. Fields that the user names replace those of their role."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        known = name.lower() if name.lower() in FIELDS else name
        if _is_missing(fields.get(known)):  # of `Answer` and `answer` the first that is filled counts
            fields[known] = value
    roles = {"question": QUESTIONS, "answer": ANSWERS, "trace": RESPONSES}
    given = {role: name for role, name in names._asdict().items() if name}
    missing = [role for role, name in given.items() if name not in values]
    if not is_strict and len(missing) == len(given):
        return fields
    if not is_strict and "trace" in missing:  # validation needs none
        missing.remove("trace")
        del given["trace"]
    if missing:
        role = missing[0]
        raise UserError(f"{role}_field = {given[role]}: {where} has no such field; it has {', '.join(values)}")
    for role, name in given.items():
        taken = {other for other in roles[role] if other != name.lower()}
        fields = {key: value for key, value in fields.items() if key not in taken}
    for role, name in given.items():
        value = values[name]
        is_complete = role == "trace" and isinstance(value, str) and "</answer>" in value
        if role == "trace" and name.lower() in RESPONSES:
            if isinstance(value, list):  # a chat, which is read where it stands
                continue
            fields.pop(name.lower(), None)  # under the name response it would count as complete
        fields["response" if is_complete else {"trace": "solution"}.get(role, role)] = value
    return fields


def _choose(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the first of the names whose field is filled; if none is, the first that is there; else nothing."""
    there = [name for name in names if name in fields]
    filled = [name for name in there if not _is_missing(fields[name])]
    return (filled or there or [""])[0]


def _read_response(
    fields: Mapping[str, Any], name: str, label: str, where: str, is_needed: bool
) -> tuple[str | None, str | None]:
    """Return the complete response, or the solution; one of them, or none.

    Messages call it `label`. A solution that is not needed may be no text: then there is none.
    """
    value = fields.get(name)
    if name in COMPLETE and (not _is_missing(value) or value in (math.inf, -math.inf)):  # which _text refuses
        chat = _as_chat(value, name, where)
        return (chat.response if chat else _text(value, label, where)), None
    is_left_out = not is_needed and isinstance(value, list | Mapping | bool)
    return None, None if is_left_out or _is_missing(value) else _text(value, label, where)


class Chat(NamedTuple):
    """A question and its answer. A system message is not read: the prompt template takes its place."""

    question: str
    response: str | None
    has_system: bool


def _as_chat(value: Any, name: str, where: str) -> Chat | None:
    """Return what a list of messages says; None if the value is no such list.

    Raises:
        UserError: a message is no message, or there is more than one question.
    """
    if not isinstance(value, list) or (name not in (*CHATS, "prompt", "completion", "response")):
        return None
    by_role: dict[str, list[str]] = {"user": [], "assistant": [], "system": []}
    for message in value:
        is_message = isinstance(message, Mapping)
        role = ROLES.get(str(message.get("role", message.get("from"))).lower()) if is_message else None
        if role is None:
            raise UserError(
                f"{where}: field {name} holds {reprlib.repr(message)}; expected messages with role and content"
            )
        by_role[role].append(_text(message.get("content", message.get("value")), f"{name}.content", where))
    if len(by_role["user"]) > 1 or len(by_role["assistant"]) > 1 or not (by_role["user"] or by_role["assistant"]):
        raise UserError(
            f"{where}: field {name} has {len(by_role['user'])} questions and {len(by_role['assistant'])} answers; "
            "only one question with one answer is read"
        )
    return Chat("".join(by_role["user"]), "".join(by_role["assistant"]) or None, bool(by_role["system"]))


def _split_chat_response(text: str, has_answer: bool) -> tuple[str | None, str | None]:
    """Return what an assistant wrote as a complete response, or as a solution that still needs the answer's format."""
    if "</answer>" in text or not (has_answer or _final_answer(text)):
        return text.strip().removeprefix("<think>"), None
    return None, text


def _final_answer(solution: str) -> str | None:
    """Return what the last \\boxed{} holds; or what follows #### in the last line, which may be a heading elsewhere."""
    from plainrl.grading.rewards import last_boxed

    last_line = re.search(r"####[ \t]*(\S[^\n]*?)\s*\Z", solution)
    return last_boxed(solution) or (last_line[1] if last_line else None)


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list):
        return all(map(_is_missing, value))
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _answers(value: Any, name: str, where: str) -> list[str]:
    """Return the right answers as texts: one, those of a list, or none."""
    if isinstance(value, Mapping) and name == "reward_model":
        name, value = "reward_model.ground_truth", value.get("ground_truth")
    values = value if isinstance(value, list) else [value]
    return [_text(item, name, where) for item in values if not _is_missing(item)]


def _text(value: Any, name: str, where: str) -> str:
    """Return a value as text: a text as it is, a finite number in digits, a whole one without a point.

    pandas writes integers as 7.0 where some are missing.

    Raises:
        UserError: the value is something else, or the text holds what no tokenizer takes.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        return format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: field {name} is {reprlib.repr(value)}; expected text")
    if strange := strange_character(value):
        raise UserError(f"{where}: field {name} holds the character {strange}, which is no text; remove it")
    return value


def strange_character(text: str) -> str:
    r"""Return how the first character is written that no tokenizer takes: NUL or a lone surrogate. "": there is none.

    >>> strange_character("a\udc80b"), strange_character("text")
    ("'\\udc80'", '')
    """
    strange = re.search("[\0\ud800-\udfff]", text)
    return repr(strange[0]) if strange else ""
