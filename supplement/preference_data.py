"""Preference pairs: a prompt with a chosen and a rejected response. Read from files, or made of the arithmetic.

    {"chosen", "rejected"}             conversations "\\n\\nHuman: ...\\n\\nAssistant: ...", as in Anthropic's HH
    {"prompt", "chosen", "rejected"}   an instruction and two responses
    arithmetic                         the embedded traces; in the rejected ones the last sum and the answer are wrong

Of conversations only those of one turn are used: in longer ones the humans' later messages differ, too.

    python -m supplement.preference_data PAIRS.jsonl [key=value ...]    writes the pairs that a run would train on

Source: Stanford CS336 (Spring 2025), supplement of Assignment 5, section 5.2. Bai et al., Training a Helpful and
Harmless Assistant, 2022.
"""

import plainrl.startup  # noqa: F401  # first: Ctrl-C during the imports shows no traceback

import codecs
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from plainrl.cli import load_config, require_one_process, run_main
from plainrl.data import comparable, fixed_subset, hold_out, keep_short, load_validation
from plainrl.layouts import strange_character
from plainrl.prompting import fill_prompt, load_prompt_template
from plainrl.records import Example, UserError
from plainrl.sources import (
    PARQUET,
    BrokenLineError,
    arithmetic_records,
    corrupt_some,
    decode_text,
    embedded_terms,
    path_exists,
    read_data_file,
    read_json_lines,
    read_records,
    records_in,
)
from plainrl.supplement_config import DPOConfig
from SFT_helper import encode_prompt
from SFT_train import encode_whole_response

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
PAIR_FIELDS = ("chosen", "rejected")
MOST_SHOWN = 5  # lines that a message names


class Pair(NamedTuple):
    """An instruction, two responses to it, and where they come from."""

    instruction: str
    chosen: str
    rejected: str
    source: str


class TokenizedPair(NamedTuple):
    """The same as token ids. The prompt is in the template, and the responses end in EOS or the stop string."""

    pair: Pair
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class MalformedError(ValueError):
    """A record that is no pair."""


class SeveralTurnsError(ValueError):
    """A conversation in which the human speaks more than once."""


def main(arguments: list[str]) -> None:
    """Write the pairs that DPO_train.py reads with the same settings to a new file, one JSON object a line.

    It holds them before long ones are left out. SFT_train.py can read the chosen responses. DPO_train.py can read it
    with `num_pairs=all`, and holds validation pairs out of it: those of this run are not in it.
    """
    require_one_process("preference_data")
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        raise UserError("write the name of a new file first, and key=value after it: PAIRS.jsonl preset=laptop")
    if (path := Path(arguments[0])).exists():
        raise UserError(f"{path} is there already: remove it, or write to another file")
    config = load_config(DPOConfig, Path(__file__).with_name("dpo_train.yaml"), arguments[1:])
    validation = load_validation(config) if config.validation_data else None
    pairs, _ = load_pairs(validation.everything if validation else [], config)
    rows = (  # the first three are DPO's, the last two SFT's
        {"prompt": p.instruction, "chosen": p.chosen, "rejected": p.rejected}
        | {"question": p.instruction, "response": p.chosen}
        for p in pairs
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load_pairs(held_out: Sequence[Example], config: DPOConfig) -> tuple[list[Pair], list[Pair]]:
    """Return the training pairs and the validation pairs. They have no instruction in common.

    Those of the arithmetic come from its two splits. Of other data, `num_validation_pairs` are drawn by a fixed seed.

    Args:
        held_out: questions that are sampled in evaluations. No training pair asks one of them.
        config: names the data, and how many pairs of each kind there are.

    Raises:
        UserError: the data cannot be read, or there are too few pairs.
    """
    terms = embedded_terms(config.train_data, config.arithmetic_terms)
    if terms is not None:
        train, others = arithmetic_pairs("train", terms, config), arithmetic_pairs("validation", terms, config)
    else:
        train = others = read_pairs(config.train_data)
    wanted = config.num_validation_pairs
    if len(others) < wanted + (train is others):
        raise UserError(
            f"num_validation_pairs = {wanted}: {config.train_data} has {len(others)} pairs; ask for fewer, so that "
            "some are left to train on"
        )
    validation = fixed_subset(others, wanted)
    taken = {comparable(pair.instruction) for pair in validation}
    left = (pair for pair in train if comparable(pair.instruction) not in taken)
    examples = [Example(pair.instruction, pair.instruction, None, None, pair.source) for pair in left]
    asked = {example.question for example in hold_out(examples, held_out, config)} if examples else set()
    train = [pair for pair in train if pair.instruction in asked]
    random.Random(config.seed).shuffle(train)
    if config.num_pairs != "all":
        if config.num_pairs > len(train):
            raise UserError(
                f"num_pairs = {config.num_pairs}: {len(train)} pairs can be trained on; ask for fewer, or all"
            )
        train = train[: config.num_pairs]
    if not train:
        raise UserError(f"train_data = {config.train_data}: every pair has an instruction that is held out")
    print(f"preference pairs: {config.train_data}, {len(train)} to train on, {len(validation)} held out")
    return train, validation


def arithmetic_pairs(split: Literal["train", "validation"], terms: tuple[int, int], config: DPOConfig) -> list[Pair]:
    """Return pairs of the right and the corrupted trace of each embedded question, see `sources.corrupt_some`."""
    records = arithmetic_records(split, terms, config.arithmetic_max_term)
    write = config.reward_function.write_response
    return [
        Pair(
            right.question,
            write(right.reasoning or "", right.ground_truth or ""),
            write(wrong.reasoning or "", wrong.wrong_answer or ""),
            right.source,
        )
        for right, wrong in zip(records, corrupt_some(records, 1.0), strict=True)
    ]


def read_pairs(source: str) -> list[Pair]:
    """Return the pairs of a file, of all files of a folder, or of a hub data set.

    Left out, counted and named are: malformed lines, conversations of several turns, and pairs of equal responses,
    which teach nothing.

    Raises:
        UserError: the data cannot be read, or they hold no pair.
    """
    path = Path(source)
    is_folder = path_exists(path) and path.is_dir()
    files = sorted(str(file) for file in path.iterdir() if is_data(file)) if is_folder else [source]
    pairs: list[Pair] = []
    left_out: dict[str, list[str]] = {}
    num_records = 0
    for values, where in (record for file in files for record in _read_tolerantly(file)):
        num_records += 1
        try:
            pair = parse_pair(values, where)
        except MalformedError as error:
            left_out.setdefault("malformed", []).append(f"{where} ({error})")
        except SeveralTurnsError:
            left_out.setdefault("conversations of several turns", []).append(where)
        else:
            if pair.chosen == pair.rejected:
                left_out.setdefault("pairs of equal responses", []).append(where)
            else:
                pairs.append(pair)
    for reason, places in left_out.items():
        shown = "; ".join(places[:MOST_SHOWN]) + (f"; and {len(places) - MOST_SHOWN} more" * (len(places) > MOST_SHOWN))
        print(f"left out: {len(places)} of {num_records} records of {source} are {reason}: {shown}")
    if not pairs:
        raise UserError(f"train_data = {source}: none of its {num_records} records is a preference pair of one turn")
    return pairs


def parse_pair(values: Any, where: str) -> Pair:
    """Return the pair that a record holds.

    Raises:
        MalformedError: the record is no pair. The message says why.
        SeveralTurnsError: it is one, but the human speaks more than once.
    """
    if not isinstance(values, dict):
        raise MalformedError(f"broken JSON: {values}" if isinstance(values, BrokenLineError) else "no object")
    names = [name for name in ("chosen", "rejected") if not isinstance(values.get(name), str)]
    if names:
        raise MalformedError(f"{names[0]} is missing or no text")
    prompt, responses = values.get("prompt"), [values["chosen"], values["rejected"]]
    if prompt is None:
        (prompt, chosen), (other, rejected) = map(split_conversation, responses)
        if prompt != other:
            raise MalformedError("the two conversations begin differently")
    else:
        chosen, rejected = responses
    if not isinstance(prompt, str):
        raise MalformedError("prompt is no text")
    if not all(text.strip() for text in (prompt, chosen, rejected)):
        raise MalformedError("an instruction or a response is empty")
    if strange := strange_character(prompt + chosen + rejected):
        raise MalformedError(f"it holds {strange}, which is no text: a lone surrogate, or a byte that is no UTF-8")
    return Pair(prompt, chosen, rejected, where)


def split_conversation(text: str) -> tuple[str, str]:
    r"""Return the human's message and the assistant's answer.

    >>> split_conversation("\n\nHuman: Hello\n\nAssistant: Hi!")
    ('Hello', 'Hi!')
    """
    if text.count(HUMAN) > 1:
        raise SeveralTurnsError
    human, separator, assistant = text.partition(ASSISTANT)
    if not human.startswith(HUMAN) or not separator or ASSISTANT in assistant:
        raise MalformedError("no message of a human with one answer of the assistant")
    return human.removeprefix(HUMAN).strip(), assistant.strip()


def tokenize_pairs(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, config: DPOConfig) -> list[TokenizedPair]:
    """Put the instructions into the template, and tokenize. None is ever cut.

    Raises:
        UserError: pairs exceed `max_context_tokens` and `drop_long_examples` is off, or none is left.
    """
    template = load_prompt_template(config.prompt)
    tokenized = [
        TokenizedPair(
            pair,
            encode_prompt(fill_prompt(template, pair.instruction), tokenizer),
            encode_whole_response(pair.chosen, tokenizer, config.stop_string),
            encode_whole_response(pair.rejected, tokenizer, config.stop_string),
        )
        for pair in pairs
    ]
    lengths = [len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids)) for row in tokenized]
    examples = [Example(pair.instruction, "", None, None, pair.source) for pair in pairs]
    are_longer = f"preference pairs exceed max_context_tokens = {config.max_context_tokens}"
    kept = keep_short(lengths, config.max_context_tokens, examples, are_longer, config)
    return [tokenized[index] for index in kept]


def is_data(file: Path) -> bool:
    """Return whether something in a folder is a file of data: no folder, and not hidden, as .gitattributes is."""
    return file.is_file() and not file.name.startswith(".")


def _read_tolerantly(source: str) -> Iterator[tuple[Any, str]]:
    """Yield the records of a source with their places. If a line is no JSON, the record is an error.

    Bytes that are no UTF-8 become characters that `parse_pair` refuses.
    """
    if not path_exists(Path(source)):
        yield from read_records(source, PAIR_FIELDS)  # a hub data set, or the message that the file does not exist
        return
    data = read_data_file(source)
    if data.startswith(PARQUET) or data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from records_in(data, source, PAIR_FIELDS)
        return
    yield from read_json_lines(decode_text(data, f"data file {source}", errors="surrogateescape"), source)


if __name__ == "__main__":
    run_main(main)
