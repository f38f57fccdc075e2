"""Turn records into examples: prompts, splits, held-out questions, the order of training, seeds."""

import contextlib
import hashlib
import io
import random
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from plainrl.config import RolloutConfig, RunConfig, SFTConfig, TrainConfig
from plainrl.layouts import FieldNames, parse_record
from plainrl.prompting import format_response, load_prompt_template, read_answers, write_prompt
from plainrl.records import Example, Fields, UserError
from plainrl.shared_config import validation_source
from plainrl.sources import arithmetic_records, corrupt_some, embedded_terms, is_pipe, read_records
from SFT_helper import encode_prompt

DataKey = Literal["train_data", "validation_data"]
VALIDATION: DataKey = "validation_data"
EXAMPLES_OF: dict[DataKey, str] = {"train_data": "training examples", VALIDATION: "validation questions"}
VALIDATION_SUBSET_SEED = 20250
Item = TypeVar("Item")


def load_sft_examples(config: SFTConfig) -> list[Example]:
    """Return the training examples that have a response. Exact repetitions are merged into one.

    Raises:
        UserError: the data cannot be read, or no record has a response.
    """
    examples = load_examples(config.train_data, config, "train", config.arithmetic_corrupt_fraction)
    examples = keep(examples, lambda example: bool(example.response), "have no response to imitate", config)
    return list({(example.prompt, example.response): example for example in examples}.values())


def load_validation_set(config: RunConfig) -> list[Example]:
    """Return the validation questions that have an answer. The others could never be answered.

    They are those of `validation_data`, or of `validation_fraction` of the training data, then those of each set of
    `extra_validation_data`, which carry its name.

    Raises:
        UserError: the data cannot be read, or no question of a set has an answer.
    """
    if config.validation_fraction:
        everything = split_validation(config)
    else:
        everything = keep_answered(load_examples(config.validation_data, config, "validation"), config, VALIDATION)
    for name, source in config.extra_validation_data.items():
        of_set = config.model_copy(update={VALIDATION: source})
        examples = keep_answered(load_examples(source, of_set, "validation"), of_set, VALIDATION)
        everything += [example._replace(dataset=name) for example in examples]
    require_reward_fields(everything, config)
    return everything


def split_validation(config: RunConfig) -> list[Example]:
    """Return the questions of `train_data` that `validation_fraction` holds out, each once.

    Which they are depends on the questions and on `validation_seed` alone.

    Raises:
        UserError: the data cannot be read, or no question has an answer.
    """
    if is_pipe(config.train_data):
        raise UserError(f"validation_fraction: train_data = {config.train_data} is a pipe, read only once; name a file")
    with contextlib.redirect_stdout(io.StringIO()):  # the training questions say it
        examples = keep_answered(load_examples(config.train_data, config, "train"), config)
    by_question = {comparable(example.question): example for example in reversed(examples)}
    seeds = {key: derive_seed(config.validation_seed, "validation", key) for key in by_question}
    order = sorted(by_question, key=seeds.__getitem__)
    chosen = set(order[: max(1, round(config.validation_fraction * len(order)))])
    print(
        f"validation: {len(chosen)} of {len(order)} questions of {config.train_data} (validation_fraction = "
        f"{config.validation_fraction:g}, validation_seed = {config.validation_seed}); validation_data is not read"
    )
    return [example for question, example in by_question.items() if question in chosen][::-1]


def require_reward_fields(examples: Sequence[Example], config: RunConfig) -> None:
    """Raise a UserError if the reward function asks for a field that a question does not have."""
    wanted = config.reward_function.wanted.required
    for example in examples:
        if missing := sorted(wanted - example.reward_fields.keys()):
            has = ", ".join(sorted(example.reward_fields))
            raise UserError(
                f"reward = {config.reward}: it asks for {missing[0]}, which {example.source} does not have; it has "
                f"{has}; add the column, or give the parameter a default"
            )


class ValidationData(NamedTuple):
    """Held-out questions: all of them, those of evaluations during training, and those of the final one."""

    everything: list[Example]
    during: list[Example]
    final: list[Example]

    @property
    def asked(self) -> list[Example]:
        """All questions that are put to the policy, each once."""
        return list(dict.fromkeys([*self.during, *self.final]))


def load_validation(config: TrainConfig) -> ValidationData:
    """Return the validation questions, and the two fixed subsets of them that evaluations ask."""
    everything = load_validation_set(config)
    return ValidationData(
        everything, validation_subset(everything, config), draw_subsets(everything, config.num_final_eval_examples)
    )


def validation_subset(validation_set: list[Example], config: RunConfig) -> list[Example]:
    """Return the fixed subset for evaluations during training. It does not depend on the run's seed.

    Of each set it has `num_eval_examples` questions. A smaller set is returned whole, and that is said.
    """
    for name, examples in by_dataset(validation_set).items():
        if config.num_eval_examples != "all" and len(examples) < config.num_eval_examples:
            print(
                f"evaluations ask all {len(examples)} validation questions{f' of {name}' if name else ''}, fewer than "
                f"num_eval_examples = {config.num_eval_examples}"
            )
    return draw_subsets(validation_set, config.num_eval_examples)


def by_dataset(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Return the examples of each validation set by its name. That of `validation_data` has none, and comes first."""
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example.dataset, []).append(example)
    return found


def draw_subsets(validation_set: Sequence[Example], most: int | Literal["all"]) -> list[Example]:
    """Return a fixed random subset of each set, in its order. A set with no more than `most` questions stays whole."""
    return [example for examples in by_dataset(validation_set).values() for example in fixed_subset(examples, most)]


def fixed_subset(items: Sequence[Item], most: int | Literal["all"], seed: int = VALIDATION_SUBSET_SEED) -> list[Item]:
    """Return at most `most` items in their order: a random subset that the seed decides.

    >>> fixed_subset("abc", "all"), len(fixed_subset(range(100), 16, seed=1))
    (['a', 'b', 'c'], 16)
    """
    size = len(items) if most == "all" else min(most, len(items))
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), size))]


def load_questions(validation_set: Sequence[Example], config: RolloutConfig) -> list[Example]:
    """Return the training questions that have an answer and are not in the validation set.

    Raises:
        UserError: no question is left, or there are fewer questions than a step needs.
    """
    questions = keep_answered(load_examples(config.train_data, config, split="train"), config)
    questions = hold_out(questions, validation_set, config)
    require_reward_fields(questions, config)
    _require_enough(questions, config)
    return questions


def keep(
    examples: list[Example],
    is_kept: Callable[[Example], bool],
    reason: str,
    config: RunConfig,
    key: DataKey = "train_data",
) -> list[Example]:
    """Return the examples that may be used. Print how many are left out, and why.

    Args:
        examples: the training examples or validation questions.
        is_kept: tells whether an example may be used.
        reason: why the others are left out, as the predicate of a sentence about them.
        config: names the data set, for the message.
        key: which of its data sets they come from.

    Raises:
        UserError: no example may be used.
    """
    kept, left_out = [], []
    for example in examples:
        (kept if is_kept(example) else left_out).append(example)
    if left_out:
        message = f"{len(left_out)} of {len(examples)} {EXAMPLES_OF[key]} {reason}, the first at {left_out[0].source}"
        if not kept:
            raise UserError(f"{key} = {getattr(config, key)}: {message}; use other data")
        print(f"left out: {message}")
    return kept


def hold_out(examples: list[Example], validation_set: Sequence[Example], config: RunConfig) -> list[Example]:
    """Return the training examples whose question is not in the validation set, however it is spaced."""

    def texts(example: Example) -> set[str]:
        return {comparable(example.question), comparable(example.prompt)}

    held_out = {text for example in validation_set for text in texts(example)}
    return keep(
        examples,
        lambda example: not texts(example) & held_out,
        "have their question in " + ("the validation set" if config.validation_fraction else config.validation_data),
        config,
    )


def comparable(text: str) -> str:
    """Return a text as it is compared with others: one space between words, one form for each character.

    >>> comparable("What is  2 + 2?\\n")
    'What is 2 + 2?'
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def keep_answered(examples: list[Example], config: RunConfig, key: DataKey = "train_data") -> list[Example]:
    """Return the examples that have an answer to grade against. Two of MATH's 7,500 have none."""
    return keep(examples, lambda example: example.ground_truth is not None, "have no answer", config, key)


def load_examples(
    source: str, config: RunConfig, split: Literal["train", "validation"], corrupt_fraction: float = 0.0
) -> list[Example]:
    """Return all examples of a data source, with their prompts and responses written out.

    An answer that no response can equal is no answer. How many records have one is printed.

    Args:
        source: `arithmetic` or `arithmetic:FEWEST-MOST`, a file, or a hub data set.
        config: names prompt, reward and task.
        split: which embedded questions. A file or a hub data set is read whole.
        corrupt_fraction: share of the embedded traces that are made wrong, see `corrupt_some`.

    Raises:
        UserError: the data or the prompt template cannot be read.
    """
    sources = [config.train_data, config.validation_data]
    if all(map(is_pipe, sources)) and Path(sources[0]).samefile(sources[1]):
        raise UserError(
            f"train_data = {sources[0]} and validation_data = {sources[1]} are one pipe, which can be read only once; "
            "give each a pipe or a file of its own"
        )
    reward = config.reward_function
    wanted = reward.wanted
    if terms := embedded_terms(source, config.arithmetic_terms):
        records = arithmetic_records(split, terms, config.arithmetic_max_term)
        records = corrupt_some(records, corrupt_fraction)
    else:  # validation data may lack the fields that are named: see parse_record
        names = FieldNames(config.question_field, config.answer_field, config.trace_field)
        found = read_records(source, None if wanted.takes_all else {*names, *wanted.names})
        records = [parse_record(values, where, names, split == "train") for values, where in found]
    if not records:
        raise UserError(f"{source} has no records; give a file with at least one")
    if num_with_system := sum(record.has_system_message for record in records):
        print(f"left out: the system messages of {num_with_system} records of {source}; the prompt takes their place")
    template = load_prompt_template(config.prompt)
    return [
        Example(
            question=record.question,
            prompt=write_prompt(record, template, config),
            ground_truth=truth,
            response=record.response or format_response(record.reasoning, record.wrong_answer or answer, reward),
            source=record.source,
            fields=Fields({k: v for k, v in record.columns.items() if wanted.takes_all or k in wanted.names}),
        )
        for record, (truth, answer) in zip(records, read_answers(records, reward, source), strict=True)
    ]


def epoch_order(num_examples: int, num_draws: int, seed: int) -> list[int]:
    """Return indices that run through all examples, in a new random order each epoch.

    Epochs follow each other without a gap, so that no example is left out at the end of an epoch.

    Args:
        num_examples: how many examples there are.
        num_draws: how many indices to return.
        seed: decides the orders.

    >>> sorted(epoch_order(num_examples=4, num_draws=8, seed=0)[:4])
    [0, 1, 2, 3]
    """
    order: list[int] = []
    epoch = 0
    while len(order) < num_draws:
        order += order_of_epoch(num_examples, epoch, seed)
        epoch += 1
    return order[:num_draws]


def order_of_epoch(num_examples: int, epoch: int, seed: int) -> list[int]:
    """Return the indices of all examples in the random order of one epoch. The first epoch is 0."""
    permutation = list(range(num_examples))
    random.Random(f"{seed} epoch {epoch}").shuffle(permutation)
    return permutation


def describe_sources(examples: Sequence[Example]) -> str:
    """Return in one line where the first few examples come from, for messages."""
    named = ", ".join(example.source for example in examples[:8])
    return named if len(examples) <= 8 else f"{named} and {len(examples) - 8} more"


def derive_seed(*parts: object) -> int:
    """Return a 31-bit seed that depends on its parts alone.

    >>> derive_seed(0, "evaluation", 1) == derive_seed(0, "evaluation", 1) != derive_seed(0, "evaluation", 2)
    True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1


def fit_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: RunConfig, noun: str
) -> tuple[list[Example], list[list[int]]]:
    """Return the examples whose prompts leave room for a response, and the token ids of these prompts.

    Raises:
        UserError: a prompt and a response of `sampling_max_tokens` exceed the context together, and
            `drop_long_examples` is off, or none is left.
    """
    prompt_ids = [encode_prompt(example.prompt, tokenizer) for example in examples]
    most = config.max_context_tokens - config.sampling_max_tokens
    limit = f"max_context_tokens - sampling_max_tokens = {most}"
    fitting = keep_short([len(ids) for ids in prompt_ids], most, examples, f"{noun} are longer than {limit}", config)
    return [examples[index] for index in fitting], [prompt_ids[index] for index in fitting]


def fit_questions(
    questions: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: RolloutConfig
) -> tuple[list[Example], list[list[int]]]:
    """Return the training questions that fit, and the token ids of their prompts; see `fit_prompts`.

    Raises:
        UserError: as there, or fewer are left than a step needs.
    """
    fitting, prompt_ids = fit_prompts(questions, tokenizer, config, "training prompts")
    _require_enough(fitting, config)
    return fitting, prompt_ids


def fit_validation(
    validation: ValidationData, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> ValidationData:
    """Return the validation questions without those asked that do not fit; see `fit_prompts`.

    Raises:
        UserError: as there, or none is left for an evaluation.
    """
    fitting = set(fit_prompts(validation.asked, tokenizer, config, "validation prompts")[0])
    if len(fitting) == len(validation.asked):
        return validation
    during, final = ([e for e in part if e in fitting] for part in (validation.during, validation.final))
    print(f"evaluations ask {len(during)} questions during training, and {len(final)} at the end")
    for part in (during, final):
        require_questions(part, config)
    return validation._replace(during=during, final=final)


def require_questions(examples: Sequence[Example], config: RunConfig) -> None:
    """Raise a UserError if none of the examples is of the validation data itself, but of further sets at most."""
    if "" not in by_dataset(examples):
        source = validation_source(config.model_dump())
        raise UserError(f"validation data, {source}: no question is left; raise max_context_tokens")


def keep_short(
    lengths: Sequence[int], most: int, examples: Sequence[Example], are_longer: str, config: RunConfig
) -> list[int]:
    """Return the indices of the examples that are not too long. None is ever cut.

    Args:
        lengths: of the examples, in tokens.
        most: the largest length.
        examples: where they come from, for messages.
        are_longer: what the others are, as the end of a sentence that begins with their number.
        config: says in `drop_long_examples` whether they are left out and counted, or an error.

    Raises:
        UserError: an example is too long and `drop_long_examples` is off, or all are.
    """
    kept = [index for index, length in enumerate(lengths) if length <= most]
    if len(kept) < len(lengths):
        longest = max(range(len(lengths)), key=lambda index: lengths[index])
        message = (
            f"{len(lengths) - len(kept)} of {len(lengths)} {are_longer}, the longest with {lengths[longest]} tokens "
            f"at {examples[longest].source}"
        )
        if not config.drop_long_examples or not kept:
            alternative = " or leave them out with drop_long_examples=true" if kept else " or use other data"
            needed = config.max_context_tokens + lengths[longest] - most
            raise UserError(f"{message}; raise max_context_tokens to at least {needed},{alternative}")
        print(f"left out: {message}")
    return kept


def _require_enough(questions: Sequence[Example], config: RolloutConfig) -> None:
    if len(questions) < config.num_questions_per_step:
        raise UserError(
            f"train_data = {config.train_data} has {len(questions)} questions, but a step takes "
            f"{config.num_questions_per_step}; let it take {len(questions)} or fewer: rollout_batch_size / group_size, "
            "or ei_batch_size in expert iteration"
        )
