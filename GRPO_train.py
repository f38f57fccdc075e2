"""Reinforcement learning with verified rewards (GRPO): `uv run python GRPO_train.py [key=value ...]` (--help).

Algorithm 3 of Stanford CS336 (Spring 2025), Assignment 5. Each step:

    1. copy the policy's weights into the engine
    2. sample G responses y_1 ... y_G to each question of a batch
    3. grade them, R_i, and normalize within groups:             A_i = (R_i - mean(R)) / (std(R) + eps)
    4. off-policy: score log pi_old(y_it) once                   rho_it = pi(y_it) / pi_old(y_it)
    5. optimizer steps on L = mean_i mean_t l_it                 l_it = - A_i log pi(y_it)
    6. log: docs/metrics.md defines the metrics

LOSSES has other l_it: grpo_clip, grpo_no_clip and cispo contain rho. LENGTH_NORMALIZATIONS has other means, and
plainrl/objective.py adds KL and entropy. On-policy is one optimizer step per rollout batch: rho = 1. Off-policy is
several (epochs_per_rollout_batch > 1, or train_batch_size < rollout_batch_size). The std is the sample std; equal
rewards have A = 0 exactly. Where the loss is A times something, such responses are skipped. They still count in the
averages, so the gradient is the same.
"""

import plainrl.startup  # noqa: F401  # first: Ctrl-C during the imports shows no traceback

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from GRPO_helper import LENGTH_NORMALIZATIONS, StepSize, reduce_metadata
from plainrl.cli import load_config, run_main
from plainrl.config import GRPOConfig
from plainrl.data import derive_seed, epoch_order, fit_questions, fit_validation, load_questions, load_validation
from plainrl.devices import check_devices
from plainrl.diagnosis import diagnose
from plainrl.distributed import add_up, join
from plainrl.log_probs import get_masked_response_log_probs
from plainrl.loop import TrainingLoop, report
from plainrl.microbatches import add_metrics, microbatches
from plainrl.objective import compute_advantages, compute_token_losses, summarize_update
from plainrl.policy import (
    compute_clipped_gradient,
    load_policy,
    prepare_training,
    require_finite,
    score_responses,
)
from plainrl.precision import working_copy
from plainrl.preflight import preflight
from plainrl.records import Example, Rollout
from plainrl.reference import Reference
from plainrl.rollouts import (
    check_gap,
    make_rollouts,
    measure_gap,
    old_log_probs_in,
    summarize_step,
    write_rollouts,
)
from plainrl.run_folder import RunFolder
from plainrl.sampler import Sampler
from plainrl.selection import choose_batch, summarize_selection, training_reward
from plainrl.warm_start import apply_warm_start
from policy_evaluation import Evaluator
from SFT_helper import masked_normalize, pad_token_id


def main(arguments: list[str]) -> None:
    """Configuration, warm start, data, policy, evaluator, loop, results."""
    config = load_config(GRPOConfig, Path(__file__).with_name("grpo_train.yaml"), arguments)
    check_devices(config)
    join(config)  # with the other ranks of torchrun, if there are any
    validation = load_validation(config)
    questions = load_questions(validation.everything, config)
    with RunFolder.open(config, "grpo") as run:
        first_config = apply_warm_start(config, run.checkpoint)
        policy, tokenizer = load_policy(first_config, run.checkpoint)
        reference = Reference(policy, run, first_config) if config.kl_coefficient else None
        preflight(policy, tokenizer, run.path, config)
        questions, prompt_ids = fit_questions(questions, tokenizer, config)
        validation = fit_validation(validation, tokenizer, config)
        run.start_wandb()
        evaluator = Evaluator(config, run, tokenizer, validation.during)
        train(policy, reference, tokenizer, questions, prompt_ids, evaluator, run, config)
        evaluator.evaluate_finally(policy, config.n_grpo_steps, validation.final)
        report(run, config)
        run.finish()


def train(
    policy: PreTrainedModel,
    reference: Reference | None,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Example],
    prompt_ids: Sequence[list[int]],
    evaluator: Evaluator,
    run: RunFolder,
    config: GRPOConfig,
) -> None:
    """Run the GRPO steps that are left."""
    optimizer, padding_id = prepare_training(policy, config), pad_token_id(tokenizer)
    num_steps, sampler = config.n_grpo_steps, Sampler(evaluator, questions, prompt_ids, config)
    data = zip(prompt_ids, [question.ground_truth for question in questions], strict=True)
    steps = TrainingLoop(policy, tokenizer, optimizer, data, num_steps, evaluator, run, config, "GRPO", order=sampler)
    with steps as loop, sampler:
        for step in loop:
            # 1. Sync: copy the policy's weights into the evaluator's engine, which samples the rollouts, too. Phase 5
            #    checks their log-probs; with rollouts_ahead or a top-p below 1, probe tokens are checked here instead.
            with loop.phase("rollout"):
                sampler.finish()  # with rollouts_ahead the engine may still be sampling
            with loop.phase("sync"):
                sync_metrics = evaluator.sync(policy, with_probes=not config.rollouts_check_sync)

            # 2. Sample: group_size responses to each question. Grading begins as soon as one is finished.
            #    With dynamic_sampling, further questions follow until enough groups have right and wrong answers.
            with loop.phase("rollout"):
                sampled = sampler.sample(step)

            # 3. Grade and normalize: a response is good if it is better than the others of its group.
            with loop.phase("grade"):
                evaluator.sleep()  # on a shared GPU: its memory is the policy's until the next sync
                grades = sampled.wait_for_grades()
                sampler.order.record(sampled.chosen, grades)  # only drop_solved_questions needs it
                asked = [questions[index] for index in sampled.chosen]
                graded = make_rollouts(asked, sampled.responses, grades, advantages=None, group_size=config.group_size)
                rollouts = choose_batch(graded, config)  # those to train on: all, without dynamic_sampling
                rewards = torch.tensor([training_reward(rollout, config) for rollout in rollouts])
                for rollout, advantage in zip(rollouts, compute_advantages(rewards, config).tolist(), strict=True):
                    rollout.advantage = advantage

            # 4. Old log-probs: only if several optimizer steps follow. Else the ratio is 1, and nothing is scored.
            #    The first policy scores the rollouts for a KL term.
            with loop.phase("old_log_probs"):
                if config.is_off_policy:
                    score_old_log_probs(policy, rollouts, padding_id, config)
                if reference:
                    reference.score(policy, rollouts, padding_id, config, loop.mark_weights)

            # 5. Update: one optimizer step on-policy, several off-policy.
            with loop.phase("train"):
                metrics_rows = update_policy(policy, optimizer, rollouts, padding_id, step, config)

            # 6. Log. Metrics of rollouts are of all that were sampled; the sample file has those trained on.
            of_step = summarize_step(graded, sync_metrics, loop.seconds, config)
            of_step |= summarize_selection(graded, len(sampled.rounds), sampler.order, step, config)
            metrics_rows = loop.log(metrics_rows, of_step)
            write_rollouts(run.path / "samples" / f"rollouts_{step:06d}.jsonl", rollouts, config)
            diagnose(step, metrics_rows, config)
            loop.show(reward=f"{metrics_rows[-1]['rollout/reward']:.3f}")


def score_old_log_probs(
    policy: PreTrainedModel, rollouts: Sequence[Rollout], padding_id: int, config: GRPOConfig
) -> None:
    """Score every rollout once with the policy as it is before the first optimizer step on this batch."""
    responses = [rollout.response for rollout in rollouts]
    scores = score_responses(policy, responses, padding_id, config.scoring_batch_size, config.sampling_temperature)
    for rollout, score in zip(rollouts, scores, strict=True):
        rollout.old_log_probs = score["log_probs"]


def update_policy(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rollouts: Sequence[Rollout],
    padding_id: int,
    step: int,
    config: GRPOConfig,
) -> list[dict[str, float | None]]:
    """Take all optimizer steps on a rollout batch; return the metrics of each.

    Raises:
        UserError: loss or gradient is NaN or infinite. The policy is left as it was before that optimizer step.
        SyncError: the responses were not sampled from this policy, which is left as it was.
    """
    metrics_rows = []
    for epoch in range(config.epochs_per_rollout_batch):
        order = epoch_order(len(rollouts), len(rollouts), derive_seed(config.seed, "batches", step, epoch))
        for start in range(0, len(rollouts), config.train_batch_size):
            batch = [rollouts[index] for index in order[start : start + config.train_batch_size]]
            # A function, because float16 repeats it if the gradient overflows.
            accumulate = partial(accumulate_gradients, policy, batch, padding_id, config)
            sums, grad_norm, loss_scale = compute_clipped_gradient(policy, accumulate, config)
            if not metrics_rows and config.is_off_policy and config.has_engine_log_probs:
                sums |= measure_gap(rollouts, old_log_probs_in(rollouts), config)
            metrics = summarize_update(sums)
            require_finite(step, sums["loss"], grad_norm, "lower learning_rate, or set loss_type=grpo_clip")
            if config.rollouts_check_sync:
                check_gap(sums, config.max_sync_error)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            metrics |= {"train/grad_norm": grad_norm, "train/loss_scale": loss_scale}
            metrics["train/learning_rate"] = config.learning_rate
            metrics_rows.append(metrics)
    return metrics_rows


def accumulate_gradients(
    policy: PreTrainedModel,
    batch: Sequence[Rollout],
    padding_id: int,
    config: GRPOConfig,
    loss_scale: float = 1.0,
) -> dict[str, float]:
    """Add the gradient of one optimizer step, times loss_scale, to the parameters, microbatch by microbatch.

    Returns:
        Sums over the response tokens trained on, for `summarize_update`. The loss is not scaled.
    """
    rows, size = rows_to_train_on(batch, config)
    if not rows:  # nothing to learn: the gradient is zero, and AdamW still moves by its momentum
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    prompts, tokens = [row.response.prompt_ids for row in rows], [row.response.token_ids for row in rows]
    sums = {"loss": 0.0, "num_tokens": 0.0}
    for part in microbatches(policy, prompts, tokens, padding_id, config.microbatch_size, config.microbatch_tokens):
        chosen, mask = [rows[index] for index in part.indices], part.tensors["response_mask"]
        scores = get_masked_response_log_probs(
            working_copy(policy), **part.tensors, return_token_entropy=True, temperature=config.sampling_temperature
        )
        token_losses, metadata = compute_token_losses(chosen, scores, mask, config)
        # This microbatch's share of the step's loss: the divisors are those of the whole step. The weight is 1, and 0
        # for a microbatch that only keeps several ranks in step.
        loss = LENGTH_NORMALIZATIONS[config.length_normalization](token_losses, mask, size)
        (loss * loss_scale * part.weight).backward()

        entropy_sum = masked_normalize(scores["token_entropy"].detach(), mask, 1.0)
        found = {"loss": loss.detach(), "num_tokens": mask.sum(), "entropy_sum": entropy_sum}
        found |= {f"train/{name}": value for name, value in reduce_metadata(metadata, mask).items()}
        if config.has_engine_log_probs and not config.is_off_policy:
            found |= measure_gap(chosen, scores["log_probs"].detach()[mask].cpu(), config)
        add_metrics(sums, found, part)
    return add_up(sums) | {"num_trained_rows": float(len(rows))}


def rows_to_train_on(batch: Sequence[Rollout], config: GRPOConfig) -> tuple[list[Rollout], StepSize]:
    """Return the rows of an optimizer step that have something to learn from, and the size of the whole step.

    Skipped are rows whose loss and gradient are zero: those of advantage zero (no_baseline: of reward zero). The
    divisors count them all the same. With a KL or entropy term no row is such. With `mask_truncated_responses`
    responses that were cut are skipped, too. They count as rows, but their tokens do not count.
    """
    kept = [row for row in batch if not (config.mask_truncated_responses and row.is_truncated)]
    weights = {"advantages": lambda row: row.advantage, "raw_rewards": lambda row: training_reward(row, config)}
    weight = weights[config.loss.zero_with] if config.loss.zero_with else lambda row: 1.0
    num_tokens = sum(len(row.response.token_ids) for row in kept)
    return [row for row in kept if weight(row) != 0], StepSize(len(batch), num_tokens, config.sampling_max_tokens)


if __name__ == "__main__":
    run_main(main)
