"""Expert iteration: `uv run python expert_iteration.py [key=value ...]` (--help lists the keys).

Algorithm 2 of Stanford CS336 (Spring 2025), Assignment 5. Each of the n_ei_steps steps:

    take ei_batch_size questions; sync the weights into vLLM; sample group_size responses to each; grade them; keep the
    correct ones; supervised fine-tuning on these, ei_epochs passes; log; evaluate

Logged per optimizer step (axis `train_step`, counted in optimizer steps), over its response tokens:
    train/loss             sum over a response / normalize_constant, mean over the rows of the step
    train/loss_per_token   negative log-probability per response token, nats
    train/token_entropy    mean entropy of the policy's next-token distributions, nats
    train/grad_norm        before clipping
    train/loss_scale       see policy_evaluation.compute_clipped_gradient; 1 but in float16
    train/learning_rate, train/num_response_tokens
Logged with the last optimizer step of an expert iteration step, or on a line of their own where nothing was kept:
    rollout/num_kept                       responses trained on
    rollout/num_questions_with_correct     questions with at least one correct response, of ei_batch_size
    rollout/reward, rollout/format_reward, rollout/answer_reward   means over all responses
    rollout/reward_std_within_groups       mean over the questions of their responses' sample std
    rollout/all_right_fraction, rollout/all_wrong_fraction         questions with every answer right, or none
    rollout/zero_advantage_fraction        responses not kept (see `keep_correct`)
    rollout/response_length[_correct|_incorrect|_max], rollout/truncated_fraction
    rollout/sync_multiplicative_error, rollout/sync_max_log_prob_difference    see policy_evaluation.check_policy_sync
    reward/timeouts, reward/out_of_memory, reward/errors    answers that could not be compared; they count as wrong
    time/sync, time/rollout, time/grade, time/train, time/step (their sum): seconds
    time/tokens_per_second                 sampled, of the rollout phase
    memory/peak_gib
Each of these lines also has `ei_step`. Logged per evaluation (axis `eval_step`, counted in expert iteration steps):
eval/*, see policy_evaluation.evaluate_vllm; eval_all/*: the same on num_final_eval_examples questions, at the end.
Differences from the assignment: the questions of the steps follow each other in a random order that is run through,
instead of being drawn anew; of equal correct responses to a question one is kept; the policy is trained on the tokens
that it sampled, with EOS only where it sampled EOS; one AdamW goes through all steps, its moments are kept.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from GRPO_train import (
    Rollout,
    apply_warm_start,
    load_questions,
    report,
    sample_groups,
    summarize_step,
    thread_pool,
    write_rollouts,
)
from math_data import Example, epoch_order, final_validation_subset, load_validation_set, validation_subset
from math_reward import Grade
from math_worker import NUM_WORKERS
from policy_evaluation import (
    Evaluator,
    Response,
    check_devices,
    compute_clipped_gradient,
    derive_seed,
    encode_prompts,
    load_policy,
    prepare_training,
    sleep_vllm_instance,
)
from run_checkpoint import TrainingState, fingerprint
from run_config import ExpertIterationConfig, UserError, load_config, run_main
from run_directory import RunDirectory
from run_guard import StopGuard
from SFT_helper import pad_token_id
from SFT_train import TokenizedExample, accumulate_gradients


def main(arguments: list[str]) -> None:
    """Configuration, warm start, data, policy, evaluator, loop, results."""
    config = load_config(ExpertIterationConfig, Path(__file__).with_name("expert_iteration.yaml"), arguments)
    check_devices(config)
    validation_set = load_validation_set(config)
    validation_examples = validation_subset(validation_set, config)
    final_examples = final_validation_subset(validation_set, config)
    questions = load_questions(validation_set, config)
    with RunDirectory.open(config, "expert-iteration") as run:
        print(f"run folder: {run.path}")
        policy, tokenizer = load_policy(config if run.checkpoint else apply_warm_start(config), run.checkpoint)
        prompt_ids = encode_prompts(questions, tokenizer, config)
        for examples_to_ask in (validation_examples, final_examples):  # too long: found before the engine starts
            encode_prompts(examples_to_ask, tokenizer, config)
        run.start_wandb()
        evaluator = Evaluator(config, run, tokenizer, validation_examples)
        train(policy, tokenizer, questions, prompt_ids, evaluator, run, config)
        evaluator.evaluate_finally(policy, config.n_ei_steps, final_examples)
        report(run, config)
        run.finish()
        print(f"model, metrics, samples and figures: {run.path} (load the model from {run.path / 'final'})")


def train(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Example],
    prompt_ids: Sequence[list[int]],
    evaluator: Evaluator,
    run: RunDirectory,
    config: ExpertIterationConfig,
) -> None:
    """Run all steps that are left, evaluating before the first, every `eval_interval` and after the last."""
    optimizer = prepare_training(policy, config)
    padding_id = pad_token_id(tokenizer)
    order = epoch_order(len(questions), config.n_ei_steps * config.ei_batch_size, config.seed)
    truths = [question.ground_truth for question in questions]
    state = TrainingState(policy, tokenizer, optimizer, fingerprint(zip(prompt_ids, truths, strict=True)))
    num_steps = config.n_ei_steps
    run.restore(state, num_steps)
    # how many there were follows from the responses kept, not from the step
    num_updates = run.last_train_step()
    with StopGuard(state, run.save_checkpoint, run.path) as guard, thread_pool(NUM_WORKERS) as grading_threads:
        evaluator.keep_and_evaluate(state, num_steps)
        progress = tqdm(range(state.step + 1, num_steps + 1), "EI", num_steps, unit="step", initial=state.step)
        for step in progress:
            guard.stop_if_requested()
            seconds: dict[str, float] = {}
            with run.watched("sync", seconds):
                sync_metrics = evaluator.sync(policy)

            chosen = order[(step - 1) * config.ei_batch_size : step * config.ei_batch_size]
            with run.watched("rollout", seconds):
                responses, gradings = sample_groups(
                    evaluator.llm, questions, prompt_ids, chosen, step, config, grading_threads
                )
            with run.watched("grade", seconds):
                if config.shares_gpu:
                    sleep_vllm_instance(evaluator.llm)
                grades = [grading.result() for grading in gradings]
                rollouts = keep_correct([questions[index] for index in chosen], responses, grades, config)
            kept = [rollout for rollout in rollouts if rollout.advantage]
            if not kept:
                tqdm.write(
                    f"step {step}: none of {len(rollouts)} responses is correct, nothing to train on", file=sys.stdout
                )
            guard.stop_if_requested()

            with run.watched("train", seconds):
                rows = fine_tune(policy, optimizer, kept, padding_id, step, config)
            last_row = rows[-1] if rows else {}
            last_row |= summarize_step(rollouts, sync_metrics, seconds, config) | {
                "rollout/num_kept": len(kept),
                "rollout/num_questions_with_correct": len({rollout.example for rollout in kept}),
            }
            for index, row in enumerate(rows or [last_row], start=1):
                run.log({"train_step": num_updates + (index if rows else 0), "ei_step": step, **row})
            num_updates += len(rows)
            write_rollouts(run.path / "samples" / f"rollouts_{step:06d}.jsonl", rollouts, config)
            run.complete_step(state, step)
            guard.stop_if_requested()
            evaluator.keep_and_evaluate(state, num_steps)
            progress.set_postfix(reward=f"{last_row['rollout/reward']:.3f}", kept=len(kept))
        guard.stop_if_requested()


def keep_correct(
    questions: Sequence[Example],
    responses: Sequence[Response],
    grades: Sequence[Grade],
    config: ExpertIterationConfig,
) -> list[Rollout]:
    """Return all responses as rollouts, those to train on with advantage 1, the others with 0.

    SFT on the kept responses is a policy gradient with just these advantages. Kept are, per question, all correct
    responses that differ in their token ids, or the first correct one.

    Args:
        questions: of the step; one that comes twice, where the order starts again, counts as one.
        responses: group_size to each question, those of a group next to each other.
        grades: of the responses.
        config: `group_size` and `keep_correct`.
    """
    repeated = [question for question in questions for _ in range(config.group_size)]
    rollouts, seen = [], set()
    for question, response, grade in zip(repeated, responses, grades, strict=True):
        key = (question, tuple(response.token_ids) if config.keep_correct == "distinct" else None)
        is_kept = grade.rewards["reward"] == 1 and key not in seen
        if is_kept:
            seen.add(key)
        rollouts.append(Rollout(question, response, grade.rewards, float(is_kept), grade.failure))
    return rollouts


def fine_tune(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    kept: Sequence[Rollout],
    padding_id: int,
    step: int,
    config: ExpertIterationConfig,
) -> list[dict[str, float | int | None]]:
    """Take `ei_epochs` passes of SFT over the kept responses; return the metrics of each optimizer step.

    The last batch of a pass may be smaller; its loss is the mean over its own rows.

    Raises:
        UserError: loss or gradient is no number; the policy is left as it was before that optimizer step.
    """
    examples = [TokenizedExample(row.example, row.response.prompt_ids, row.response.token_ids) for row in kept]
    rows: list[dict[str, float | int | None]] = []
    for epoch in range(config.ei_epochs):
        order = epoch_order(len(kept), len(kept), derive_seed(config.seed, "batches", step, epoch))
        for start in range(0, len(kept), config.train_batch_size):
            batch = [examples[index] for index in order[start : start + config.train_batch_size]]
            accumulate = partial(accumulate_gradients, policy, batch, padding_id, config)
            metrics, grad_norm, loss_scale = compute_clipped_gradient(policy, accumulate, config)
            if not math.isfinite(metrics["train/loss"]) or not math.isfinite(grad_norm):
                raise UserError(
                    f"step {step}: loss {metrics['train/loss']}, gradient norm {grad_norm}; lower learning_rate"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rows.append(
                {
                    **metrics,
                    "train/grad_norm": grad_norm,
                    "train/loss_scale": loss_scale,
                    "train/learning_rate": config.learning_rate,
                }
            )
    return rows


if __name__ == "__main__":
    run_main(main)
