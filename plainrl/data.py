"""Turn records into examples: prompts, splits, held-out questions, the order of training, seeds."""

import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from plainrl.config import EMBEDDED_DATA, RolloutConfig, RunConfig, SFTConfig, TrainConfig
from plainrl.grading.rewards import Reward
from plainrl.records import Example, UserError
from plainrl.sources import arithmetic_records, corrupt_some, parse_record, path_exists, read_records
from SFT_helper import encode_prompt

PROMPTS_FOLDER = Path(__file__).parent / "prompts"
VALIDATION_SUBSET_SEED = 20250


def load_sft_examples(config: SFTConfig) -> list[Example]:
    """Return the training examples that have a response. Exact repetitions are merged into one.

    Raises:
        UserError: the data cannot be read, or no record has a response.
    """
    examples = load_examples(config.train_data, config, "train", config.arithmetic_corrupt_fraction)
    examples = keep(examples, lambda example: bool(example.response), "have no response to imitate", config.train_data)
    return list({(example.prompt, example.response): example for example in examples}.values())


def load_validation_set(config: RunConfig) -> list[Example]:
    """Return all validation questions.

    Raises:
        UserError: the data cannot be read, or a question has no ground truth.
    """
    examples = load_examples(config.validation_data, config, split="validation")
    without_answer = [example.source for example in examples if example.ground_truth is None]
    if without_answer:
        raise UserError(
            f"validation_data = {config.validation_data}: {len(without_answer)} of {len(examples)} questions have no "
            f"answer, the first at {without_answer[0]}; use data with answers"
        )
    return examples


class ValidationData(NamedTuple):
    """Held-out questions: all of them, those asked during training, and those asked at the end."""

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
        everything, validation_subset(everything, config), final_validation_subset(everything, config)
    )


def validation_subset(validation_set: list[Example], config: RunConfig) -> list[Example]:
    """Return the fixed subset for evaluations during training. It does not depend on the run's seed.

    Raises:
        UserError: the validation set has fewer questions than `num_eval_examples`.
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
    """Return the fixed subset for the evaluation at the end of training. A smaller set is returned whole."""
    if config.num_final_eval_examples == "all":
        return validation_set
    return _draw_subset(validation_set, min(config.num_final_eval_examples, len(validation_set)))


def load_questions(validation_set: Sequence[Example], config: RolloutConfig) -> list[Example]:
    """Return the training questions that have an answer and are not in the validation set.

    Raises:
        UserError: no question is left, or there are fewer questions than a step needs.
    """
    questions = keep_answered(load_examples(config.train_data, config, split="train"), config)
    questions = hold_out(questions, validation_set, config)
    if len(questions) < config.num_questions_per_step:
        raise UserError(
            f"train_data = {config.train_data} has {len(questions)} questions, but a step takes "
            f"{config.num_questions_per_step}; let it take {len(questions)} or fewer: rollout_batch_size / group_size, "
            "or ei_batch_size in expert iteration"
        )
    return questions


def keep(examples: list[Example], is_kept: Callable[[Example], bool], reason: str, source: str) -> list[Example]:
    """Return the training examples that may be used. Print how many are left out, and why.

    Args:
        examples: the training examples.
        is_kept: tells whether an example may be used.
        reason: why the others are left out, as the predicate of a sentence about them.
        source: the data set, for the message.

    Raises:
        UserError: no example may be used.
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
    """Return the training examples that have an answer to grade against. Two of MATH's 7,500 have none."""
    return keep(examples, lambda example: example.ground_truth is not None, "have no answer", config.train_data)


def load_examples(
    source: str, config: RunConfig, split: Literal["train", "validation"], corrupt_fraction: float = 0.0
) -> list[Example]:
    """Return all examples of a data source, with their prompts and responses written out.

    Args:
        source: `arithmetic`, a file, or a hub data set.
        config: names prompt, reward and task.
        split: which embedded questions. A file or a hub data set is read whole.
        corrupt_fraction: share of the embedded traces that are made wrong, see `corrupt_some`.

    Raises:
        UserError: the data or the prompt template cannot be read.
    """
    if source == EMBEDDED_DATA:
        records = arithmetic_records(split, config.arithmetic_terms, config.arithmetic_max_term)
        records = corrupt_some(records, corrupt_fraction)
    else:
        records = [parse_record(values, where) for values, where in read_records(source)]
    if not records:
        raise UserError(f"{source} has no records; give a file with at least one")
    template, reward = load_prompt_template(config.prompt), config.reward_function
    return [
        Example(
            question=record.question,
            prompt=record.prompt if record.prompt is not None else fill_prompt(template, record.question),
            ground_truth=record.ground_truth,
            response=record.response
            or format_response(record.reasoning, record.wrong_answer or record.ground_truth, reward),
            source=record.source,
        )
        for record in records
    ]


def load_prompt_template(name_or_path: str) -> str:
    """Return a prompt template: prompts/<name>.prompt, or the file at a path.

    Raises:
        UserError: there is no such template, or it lacks the place holder `{question}`.
    """
    path = PROMPTS_FOLDER / f"{name_or_path}.prompt"
    if not path_exists(path):
        path = Path(name_or_path)
    if not path_exists(path) or path.is_dir():
        names = ", ".join(sorted(file.stem for file in PROMPTS_FOLDER.glob("*.prompt")))
        raise UserError(f"prompt = {name_or_path}: no such template; use {names}, or the path of a file")
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt = {name_or_path}: cannot read {path} as UTF-8 text ({error}); convert it") from None
    if "{question}" not in template:
        raise UserError(f"prompt = {name_or_path}: {path} lacks the place holder {{question}}; add it")
    return template


def fill_prompt(template: str, question: str) -> str:
    r"""Put a question into a template. Other braces in template and question stay as they are.

    >>> fill_prompt("User: {question}", r"What is \frac{1}{2}?")
    'User: What is \\frac{1}{2}?'
    """
    return template.replace("{question}", question)


def format_response(reasoning: str | None, answer: str | None, reward: Reward) -> str | None:
    """Write reasoning and answer in the format that a reward function wants. If one is missing, return None."""
    return None if reasoning is None or answer is None else reward.write_response(reasoning, answer)


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
        permutation = list(range(num_examples))
        random.Random(f"{seed} epoch {epoch}").shuffle(permutation)
        order += permutation
        epoch += 1
    return order[:num_draws]


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


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> list[list[int]]:
    """Return the token ids of the examples' prompts.

    Raises:
        UserError: a prompt and a response of `sampling_max_tokens` exceed the context together.
    """
    prompt_ids = [encode_prompt(example.prompt, tokenizer) for example in examples]
    most = config.max_context_tokens - config.sampling_max_tokens
    lengths = [len(ids) for ids in prompt_ids]
    num_too_long = sum(length > most for length in lengths)
    if num_too_long:
        longest = max(range(len(lengths)), key=lambda index: lengths[index])
        raise UserError(
            f"{num_too_long} prompts are longer than max_context_tokens - sampling_max_tokens = {most} tokens, the "
            f"longest with {lengths[longest]} at {examples[longest].source}; raise max_context_tokens to at least "
            f"{lengths[longest] + config.sampling_max_tokens}, or shorten the prompts"
        )
    return prompt_ids


def _draw_subset(validation_set: list[Example], num_examples: int) -> list[Example]:
    chosen = random.Random(VALIDATION_SUBSET_SEED).sample(range(len(validation_set)), num_examples)
    return [validation_set[index] for index in sorted(chosen)]
