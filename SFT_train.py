"""Supervised fine-tuning on reasoning traces: `uv run python SFT_train.py [key=value ...]` (--help lists the keys).

Algorithm 1 of Stanford CS336 (Spring 2025), Assignment 5, with gradient accumulation:

    for each step: draw a batch of (prompt, response); minimize -sum log p(response token | prompt, earlier tokens)

Logged per optimizer step, over the response tokens of all its microbatches:
    train/loss            as the assignment defines it: sum over a response / normalize_constant, mean over rows
    train/loss_per_token  negative log-probability per response token, nats
    train/token_entropy   mean entropy of the policy's next-token distributions, nats
    train/grad_norm       before clipping
    train/loss_scale      see policy_evaluation.compute_clipped_gradient; 1 but in float16
    train/learning_rate, train/num_response_tokens, train/epoch
    time/step, time/tokens_per_second (prompt and response tokens, padding not counted), memory/peak_gib
Logged per evaluation: eval/*, see policy_evaluation.evaluate_vllm; eval_all/*: the same on
num_final_eval_examples questions, at the end.
Differences from the assignment: epochs follow each other without a gap, so that no example is left out of a batch; a
response that does not end in `stop_string` is taught to end in EOS.
"""

import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from math_data import (
    Example,
    describe_sources,
    epoch_order,
    final_validation_subset,
    hold_out,
    keep_answered,
    load_sft_examples,
    load_validation_set,
    validation_subset,
)
from math_reward import grade_responses
from policy_evaluation import (
    Evaluator,
    autocast,
    check_devices,
    compute_clipped_gradient,
    describe_evaluations,
    encode_prompts,
    load_policy,
    peak_memory_gib,
    prepare_training,
)
from prefix_tree import plan_microbatches, shares_prefixes
from run_checkpoint import TrainingState, fingerprint
from run_config import ExpertIterationConfig, SFTConfig, UserError, load_config, run_main
from run_directory import Line, RunDirectory, plot_metrics
from run_guard import StopGuard
from SFT_helper import (
    encode_prompt,
    encode_response,
    get_masked_response_log_probs,
    join_prompt_and_response_ids,
    masked_normalize,
    pad_token_id,
    scale_gradient,
    sft_microbatch_train_step,
)


class TokenizedExample(NamedTuple):
    """A training example as token ids."""

    example: Example
    prompt_ids: list[int]
    response_ids: list[int]


def main(arguments: list[str]) -> None:
    """Configuration, data, policy, evaluator, loop, results."""
    config = load_config(SFTConfig, Path(__file__).with_name("config.yaml"), arguments)
    check_devices(config)
    validation_set = load_validation_set(config)
    validation_examples = validation_subset(validation_set, config)
    final_examples = final_validation_subset(validation_set, config)
    examples = select_examples(hold_out(load_sft_examples(config), validation_set, config), config)
    with RunDirectory.open(config, "sft") as run:
        print(f"run folder: {run.path}")
        policy, tokenizer = load_policy(config, run.checkpoint)
        train_set = tokenize_examples(examples, tokenizer, config)
        for examples_to_ask in (validation_examples, final_examples):  # too long: found before the engine starts
            encode_prompts(examples_to_ask, tokenizer, config)
        run.start_wandb()
        evaluator = Evaluator(config, run, tokenizer, validation_examples)
        num_steps = config.max_steps or math.ceil(config.num_epochs * len(train_set) / config.train_batch_size)
        train(policy, tokenizer, train_set, num_steps, evaluator, run, config)
        evaluator.evaluate_finally(policy, num_steps, final_examples)
        report(run, config)
        run.finish()
        print(f"model, metrics, samples and figures: {run.path} (load the model from {run.path / 'final'})")


def train(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Sequence[TokenizedExample],
    num_steps: int,
    evaluator: Evaluator,
    run: RunDirectory,
    config: SFTConfig,
) -> None:
    """Run all optimizer steps that are left, evaluating before the first, every `eval_interval` and after the last."""
    order = epoch_order(len(train_set), num_steps * config.train_batch_size, config.seed)
    optimizer = prepare_training(policy, config)
    padding_id = pad_token_id(tokenizer)
    state = TrainingState(policy, tokenizer, optimizer, fingerprint(row[1:] for row in train_set))  # the token ids
    run.restore(state, num_steps)
    with StopGuard(state, run.save_checkpoint, run.path) as guard:
        evaluator.keep_and_evaluate(state, num_steps)
        progress = tqdm(range(state.step + 1, num_steps + 1), "SFT", num_steps, unit="step", initial=state.step)
        for step in progress:
            guard.stop_if_requested()
            chosen = order[(step - 1) * config.train_batch_size : step * config.train_batch_size]
            batch = [train_set[index] for index in chosen]
            learning_rate = learning_rate_at(step, num_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            seconds: dict[str, float] = {}
            with run.watched("train", seconds):
                accumulate = partial(accumulate_gradients, policy, batch, padding_id, config)
                metrics, grad_norm, loss_scale = compute_clipped_gradient(policy, accumulate, config)
                if not math.isfinite(metrics["train/loss"]) or not math.isfinite(grad_norm):
                    raise UserError(
                        f"step {step}: loss {metrics['train/loss']}, gradient norm {grad_norm}; lower learning_rate, "
                        f"or look at the batch: {describe_sources([row.example for row in batch])}"
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            num_tokens = sum(len(row.prompt_ids) + len(row.response_ids) for row in batch)
            run.log(
                {
                    "train_step": step,
                    **metrics,
                    "train/grad_norm": grad_norm,
                    "train/loss_scale": loss_scale,
                    "train/learning_rate": learning_rate,
                    "train/epoch": step * config.train_batch_size / len(train_set),
                    "time/step": seconds["time/train"],
                    "time/tokens_per_second": num_tokens / seconds["time/train"],
                    "memory/peak_gib": peak_memory_gib(config.policy_device),
                }
            )
            run.complete_step(state, step)
            guard.stop_if_requested()
            evaluator.keep_and_evaluate(state, num_steps)
            progress.set_postfix(loss=f"{metrics['train/loss_per_token']:.3f}")
        guard.stop_if_requested()


def accumulate_gradients(
    policy: PreTrainedModel,
    batch: Sequence[TokenizedExample],
    padding_id: int,
    config: SFTConfig | ExpertIterationConfig,
    loss_scale: float = 1.0,
) -> dict[str, float]:
    """Add the gradient of a whole batch, times loss_scale, to the parameters, microbatch by microbatch.

    Returns:
        The metrics of the batch; the loss is not scaled.
    """
    plan = plan_microbatches(
        [row.prompt_ids for row in batch],
        [row.response_ids for row in batch],
        config.microbatch_size,
        config.microbatch_tokens,
        shares_prefixes(policy),
    )
    loss = sum_log_prob = sum_entropy = num_tokens = torch.zeros((), device=policy.device)
    for indices in plan:
        rows = [batch[index] for index in indices]
        tensors = join_prompt_and_response_ids(
            [row.prompt_ids for row in rows], [row.response_ids for row in rows], padding_id
        )
        tensors = {name: tensor.to(policy.device, non_blocking=True) for name, tensor in tensors.items()}
        with autocast(policy, config.compute_dtype):
            scores = get_masked_response_log_probs(policy, **tensors, return_token_entropy=True)
        microbatch_loss, metadata = sft_microbatch_train_step(
            scale_gradient(scores["log_probs"], loss_scale),
            tensors["response_mask"],
            config.gradient_accumulation_steps,  # num_step_rows stands in for it in the divisor
            config.normalize_constant,
            num_step_rows=len(batch),
        )
        loss = loss + microbatch_loss
        sum_log_prob = sum_log_prob + metadata["sum_log_prob"]
        sum_entropy = sum_entropy + masked_normalize(scores["token_entropy"], tensors["response_mask"], 1.0)
        num_tokens = num_tokens + metadata["num_response_tokens"]
    return {
        "train/loss": loss.item(),
        "train/loss_per_token": -(sum_log_prob / num_tokens).item(),
        "train/token_entropy": (sum_entropy / num_tokens).item(),
        "train/num_response_tokens": int(num_tokens.item()),
    }


def learning_rate_at(step: int, num_steps: int, config: SFTConfig) -> float:
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
    """Return the training examples of a run: those that `filter_correct` keeps, then `num_sft_examples` drawn of them.

    Raises:
        UserError: no example is left, or fewer than asked for.
    """
    kept = examples
    if config.filter_correct:
        answered = keep_answered(examples, config)
        responses, truths = [e.response or "" for e in answered], [e.ground_truth or "" for e in answered]
        grades = grade_responses(responses, truths, config.reward)
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
    """Tokenize the training examples once; none is ever cut.

    Raises:
        UserError: examples exceed `max_context_tokens` and `drop_long_examples` is off, or none is left.
    """
    tokenized = []
    for example in examples:
        response = example.response or ""
        response_ids = encode_response(response, tokenizer)
        if not (config.stop_string and response.endswith(config.stop_string)):
            response_ids.append(cast(int, tokenizer.eos_token_id))
        tokenized.append(TokenizedExample(example, encode_prompt(example.prompt, tokenizer), response_ids))
    lengths = [len(row.prompt_ids) + len(row.response_ids) for row in tokenized]
    fitting = [row for row, length in zip(tokenized, lengths, strict=True) if length <= config.max_context_tokens]
    num_too_long = len(tokenized) - len(fitting)
    if num_too_long:
        longest = max(range(len(lengths)), key=lambda index: lengths[index])
        message = (
            f"{num_too_long} of {len(tokenized)} training examples exceed max_context_tokens = "
            f"{config.max_context_tokens}, the longest with {lengths[longest]} tokens at {examples[longest].source}"
        )
        if not config.drop_long_examples or not fitting:
            raise UserError(f"{message}; raise max_context_tokens, or leave them out with drop_long_examples=true")
        print(f"left out: {message}")
    num_over_limit = sum(len(row.response_ids) > config.sampling_max_tokens for row in fitting)
    if num_over_limit:
        print(
            f"{num_over_limit} of {len(fitting)} training responses are longer than sampling_max_tokens = "
            f"{config.sampling_max_tokens}: a policy that writes as long will be cut, and counted as truncated"
        )
    return fitting


def report(run: RunDirectory, config: SFTConfig) -> None:
    """Draw the run's figures and print its last lines."""
    rows = run.read_metrics()
    plot_metrics(
        {
            "training loss per response token": [Line(rows, "train_step", "train/loss_per_token", "loss (nats)")],
            "validation reward": [
                Line(rows, "eval_step", "eval/answer_reward", "answer"),
                Line(rows, "eval_step", "eval/format_reward", "format"),
            ],
        },
        run.path / "training.png",
    )
    print(describe_evaluations(rows, config.sampling_temperature))


if __name__ == "__main__":
    run_main(main)
