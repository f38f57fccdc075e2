"""Supervised fine-tuning on reasoning traces: `uv run python SFT_train.py [key=value ...]` (--help lists the keys).

Algorithm 1 of Stanford CS336 (Spring 2025), Assignment 5, with gradient accumulation. Each step:

    draw a batch of N (prompt x, response y), and take an optimizer step on

        L = - 1/N sum_i 1/C sum_t log p(y_it | x_i, y_i,<t)            C: normalize_constant

LENGTH_NORMALIZATIONS has another mean, over tokens.
The metrics are defined in docs/metrics.md, the method in docs/sft.md.
Differences from the assignment: epochs follow each other without a gap, so that no example is left out of a batch. A
response that does not end in `stop_string` is taught to end in EOS.
"""

import plainrl.startup  # noqa: F401  # first: Ctrl-C during the imports shows no traceback

import math
import random
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plainrl.cli import load_config, run_main
from plainrl.config import EpochsConfig, ExpertIterationConfig, SFTConfig
from plainrl.data import (
    describe_sources,
    epoch_order,
    fit_validation,
    hold_out,
    keep_answered,
    keep_short,
    load_sft_examples,
    load_validation,
    require_reward_fields,
)
from plainrl.devices import check_devices, peak_memory_gib
from plainrl.distributed import add_up, join, on_first
from plainrl.grading.rewards import grade_responses
from plainrl.log_probs import get_masked_response_log_probs
from plainrl.loop import TrainingLoop, report
from plainrl.microbatches import add_metrics, microbatches, rank_efficiency
from plainrl.policy import compute_clipped_gradient, load_policy, prepare_training, require_finite
from plainrl.precision import working_copy
from plainrl.preflight import preflight
from plainrl.records import Example, TokenizedExample, UserError
from plainrl.run_folder import RunFolder
from policy_evaluation import Evaluator
from SFT_helper import (
    LENGTH_NORMALIZATIONS,
    SFTStepSize,
    encode_prompt,
    encode_response,
    masked_normalize,
    pack_documents,
    pad_token_id,
)


def main(arguments: list[str]) -> None:
    """Configuration, data, policy, evaluator, loop, results."""
    config = load_config(SFTConfig, Path(__file__).with_name("config.yaml"), arguments)
    check_devices(config)
    join(config)  # with the other ranks of torchrun, if there are any
    validation = load_validation(config)
    examples = select_examples(hold_out(load_sft_examples(config), validation.everything, config), config)
    with RunFolder.open(config, "sft") as run:
        policy, tokenizer = load_policy(config, run.checkpoint)
        preflight(policy, tokenizer, run.path, config)
        train_set = tokenize_examples(examples, tokenizer, config)
        validation = fit_validation(validation, tokenizer, config)
        run.start_wandb()
        evaluator = Evaluator(config, run, tokenizer, validation.during)
        num_steps = config.num_steps(len(train_set))
        train(policy, tokenizer, train_set, num_steps, evaluator, run, config)
        evaluator.evaluate_finally(policy, num_steps, validation.final)
        report(run, config)
        run.finish()


def train(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Sequence[TokenizedExample],
    num_steps: int,
    evaluator: Evaluator,
    run: RunFolder,
    config: SFTConfig,
) -> None:
    """Run the optimizer steps that are left."""
    order = epoch_order(len(train_set), num_steps * config.train_batch_size, config.seed)
    optimizer, padding_id = prepare_training(policy, config), pad_token_id(tokenizer)
    data = (row[1:] for row in train_set)  # the token ids
    with TrainingLoop(policy, tokenizer, optimizer, data, num_steps, evaluator, run, config, "SFT") as loop:
        for step in loop:
            # 1. Draw: the next batch of an order that runs through all examples.
            chosen = order[(step - 1) * config.train_batch_size : step * config.train_batch_size]
            batch = [train_set[index] for index in chosen]

            # 2. Update.
            learning_rate = learning_rate_at(step, num_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            with loop.phase("train"):
                accumulate = partial(accumulate_gradients, policy, batch, padding_id, config)
                metrics, grad_norm, loss_scale = compute_clipped_gradient(policy, accumulate, config)
                sources = describe_sources([row.example for row in batch])
                advice = f"lower learning_rate, or look at the batch: {sources}"
                require_finite(step, metrics["train/loss"], grad_norm, advice)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            # 3. Log.
            num_tokens = sum(len(row.prompt_ids) + len(row.response_ids) for row in batch)
            row = {
                **metrics,
                "train/grad_norm": grad_norm,
                "train/loss_scale": loss_scale,
                "train/learning_rate": learning_rate,
                "train/epoch": step * config.train_batch_size / len(train_set),
                "time/step": loop.seconds["time/train"],
                "time/tokens_per_second": num_tokens / loop.seconds["time/train"],
                "memory/peak_gib": peak_memory_gib(config.policy_device),
            }
            loop.log([row])
            loop.show(loss=f"{metrics['train/loss_per_token']:.3f}")


def accumulate_gradients(
    policy: PreTrainedModel,
    batch: Sequence[TokenizedExample],
    padding_id: int,
    config: SFTConfig | ExpertIterationConfig,
    loss_scale: float = 1.0,
) -> dict[str, float]:
    """Add the gradient of a whole batch, times loss_scale, to the parameters, microbatch by microbatch.

    Returns:
        The metrics of the batch. The loss is not scaled.
    """
    prompts, responses = [row.prompt_ids for row in batch], [row.response_ids for row in batch]
    size = SFTStepSize(len(batch), sum(map(len, responses)), config.normalize_constant)
    sums: dict[str, float] = {}
    for part in microbatches(policy, prompts, responses, padding_id, config.microbatch_size, config.microbatch_tokens):
        mask = part.tensors["response_mask"]
        scores = get_masked_response_log_probs(working_copy(policy), **part.tensors, return_token_entropy=True)
        # This microbatch's share of the step's loss: the divisors count the whole batch. The weight is 1, and 0 for a
        # microbatch that only keeps several ranks in step.
        loss = LENGTH_NORMALIZATIONS[config.length_normalization].loss(scores["log_probs"], mask, size)
        (loss * loss_scale * part.weight).backward()

        found = {name: masked_normalize(values.detach(), mask, 1.0) for name, values in scores.items()}
        add_metrics(sums, found | {"loss": loss.detach(), "num_tokens": mask.sum()}, part)
    sums = add_up(sums)
    return {
        "train/loss": sums["loss"],
        "train/loss_per_token": -sums["log_probs"] / sums["num_tokens"],
        "train/token_entropy": sums["token_entropy"] / sums["num_tokens"],
        "train/num_response_tokens": int(sums["num_tokens"]),
        **rank_efficiency(sums),
    }


def learning_rate_at(step: int, num_steps: int, config: EpochsConfig) -> float:
    """Return the learning rate of a step, 1 <= step <= num_steps.

    constant: the peak. cosine: linear warm-up over `warmup_fraction` of the steps, then

        lr(s) = lr_min + (lr_max - lr_min) (1 + cos(pi s')) / 2,    s' in [0, 1],    lr_min = lr_max / 10
    """
    if config.lr_schedule == "constant":
        return config.learning_rate
    num_warmup_steps = round(config.warmup_fraction * num_steps)
    if step <= num_warmup_steps:
        return config.learning_rate * step / num_warmup_steps
    progress = (step - num_warmup_steps) / max(num_steps - num_warmup_steps, 1)
    lowest = config.learning_rate / 10
    return lowest + (config.learning_rate - lowest) * (1 + math.cos(math.pi * progress)) / 2


def select_examples(examples: list[Example], config: SFTConfig) -> list[Example]:
    """Return the training examples of a run: `num_sft_examples` drawn of those that `filter_correct` keeps.

    Raises:
        UserError: no example is left, or fewer than asked for.
    """
    kept = examples
    if config.filter_correct:
        answered = keep_answered(examples, config)
        responses, truths = [e.response or "" for e in answered], [e.ground_truth or "" for e in answered]
        require_reward_fields(answered, config)
        fields = [e.reward_fields for e in answered]
        grades = on_first(lambda: grade_responses(responses, truths, config.reward_function, fields), is_long=True)
        kept = [e for e, grade in zip(answered, grades, strict=True) if grade.rewards["answer_reward"] == 1]
        print(f"filter_correct: kept {len(kept)} of {len(examples)} traces")
    if not kept:
        raise UserError(
            f"filter_correct: the reward function {config.reward} accepts none of the {len(examples)} traces of "
            f"{config.train_data}; check reward and data, or set filter_correct=false"
        )
    seed = config.seed if config.examples_seed is None else config.examples_seed
    chosen = random.Random(seed).sample(kept, len(kept))
    if config.num_sft_examples != "all":
        if config.num_sft_examples > len(kept):
            raise UserError(
                f"num_sft_examples = {config.num_sft_examples}: {config.train_data} has {len(kept)} unique examples"
                f"{' left after filter_correct' * config.filter_correct}; ask for at most that, or all"
            )
        chosen = chosen[: config.num_sft_examples]
    print(f"training data: {config.train_data}, {len(examples)} unique examples, {len(chosen)} taken")
    return chosen


def tokenize_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: SFTConfig
) -> list[TokenizedExample]:
    """Tokenize the training examples once. None is ever cut, except by packing.

    Raises:
        UserError: examples exceed `max_context_tokens` and `drop_long_examples` is off, or none is left.
    """
    stop_string = "" if config.packing == "fixed" else config.stop_string  # EOS ends each packed document
    tokenized = []
    for example in examples:
        response_ids = encode_whole_response(example.response or "", tokenizer, stop_string)
        tokenized.append(TokenizedExample(example, encode_prompt(example.prompt, tokenizer), response_ids))
    if config.packing == "fixed":
        return pack_examples(tokenized, config)
    lengths = [len(row.prompt_ids) + len(row.response_ids) for row in tokenized]
    are_longer = f"training examples exceed max_context_tokens = {config.max_context_tokens}"
    kept = keep_short(lengths, config.max_context_tokens, examples, are_longer, config)
    fitting = [tokenized[index] for index in kept]
    num_over_limit = sum(len(row.response_ids) > config.sampling_max_tokens for row in fitting)
    if num_over_limit:
        print(
            f"{num_over_limit} of {len(fitting)} training responses are longer than sampling_max_tokens = "
            f"{config.sampling_max_tokens}: a policy that writes as long will be cut, and counted as truncated"
        )
    return [train_on_all(row) for row in fitting] if config.loss_on == "all" else fitting


def encode_whole_response(text: str, tokenizer: PreTrainedTokenizerBase, stop_string: str) -> list[int]:
    """Return the token ids of a response to imitate. If it lacks both endings, stop string and EOS, it gets EOS."""
    eos, eos_id = cast(str, tokenizer.eos_token), cast(int, tokenizer.eos_token_id)
    # An EOS at the end of the text is one token; further ones, and space after it, would never be sampled.
    response = re.sub(rf"({re.escape(eos)}\s*)+\Z", lambda _: eos, text)
    response_ids = encode_response(response, tokenizer)
    has_ended = (stop_string and response.endswith(stop_string)) or response_ids[-1:] == [eos_id]
    return response_ids if has_ended else [*response_ids, eos_id]


def train_on_all(row: TokenizedExample) -> TokenizedExample:
    """Return an example whose every token but the first is trained: only the first has nothing before it."""
    ids = row.prompt_ids + row.response_ids
    return row._replace(prompt_ids=ids[:1], response_ids=ids[1:])


def pack_examples(tokenized: Sequence[TokenizedExample], config: SFTConfig) -> list[TokenizedExample]:
    """Join examples into rows of `seq_length` inputs and labels; see `SFT_helper.pack_documents`."""
    documents = [row.prompt_ids + row.response_ids for row in tokenized]
    rows, num_tokens = pack_documents(documents, config.seq_length), sum(map(len, documents))
    if not rows:
        raise UserError(f"seq_length = {config.seq_length}: all examples have {num_tokens} tokens; lower it below that")
    print(f"packing: {len(documents)} examples of {num_tokens} tokens in {len(rows)} rows of {config.seq_length}")
    blank = tokenized[0].example._replace(question="", prompt="", response=None, ground_truth=None)
    sources = [f"packed row {number} of {config.train_data}" for number in range(1, len(rows) + 1)]
    return [
        TokenizedExample(blank._replace(source=source), row[:1], row[1:])
        for source, row in zip(sources, rows, strict=True)
    ]


if __name__ == "__main__":
    run_main(main)
