"""Expert iteration: `uv run python -m experiments.expert_iteration [key=value ...]` (--help lists the keys).

Algorithm 2 of Stanford CS336 (Spring 2025), Assignment 5. Each of the n_ei_steps steps:

    1. copy the policy's weights into the engine
    2. sample group_size responses to each of ei_batch_size questions
    3. grade them, and keep the correct ones
    4. supervised fine-tuning on these, ei_epochs passes
    5. log (docs/metrics.md defines the metrics, docs/expert_iteration.md explains the method)

Differences from the assignment: the questions of the steps follow each other in a random order that is run through,
instead of being drawn anew. Of equal correct responses to a question one is kept. The policy is trained on the tokens
that it sampled, with EOS only where it sampled EOS. One AdamW goes through all steps, and its moments are kept.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plainrl.cli import load_config, run_main
from plainrl.config import ExpertIterationConfig
from plainrl.data import derive_seed, epoch_order, fit_questions, fit_validation, load_questions, load_validation
from plainrl.devices import check_devices
from plainrl.distributed import join
from plainrl.grading.rewards import NUM_WORKERS, Grade
from plainrl.loop import TrainingLoop, report
from plainrl.policy import compute_clipped_gradient, load_policy, prepare_training, require_finite
from plainrl.preflight import preflight
from plainrl.records import Example, Response, Rollout, TokenizedExample
from plainrl.rollouts import make_rollouts, sample_groups, summarize_step, thread_pool, write_rollouts
from plainrl.run_folder import RunFolder
from plainrl.warm_start import apply_warm_start
from policy_evaluation import Evaluator
from SFT_helper import pad_token_id
from SFT_train import accumulate_gradients


def main(arguments: list[str]) -> None:
    """Configuration, warm start, data, policy, evaluator, loop, results."""
    config = load_config(ExpertIterationConfig, Path(__file__).with_name("expert_iteration.yaml"), arguments)
    check_devices(config)
    join(config)  # with the other ranks of torchrun, if there are any
    validation = load_validation(config)
    questions = load_questions(validation.everything, config)
    with RunFolder.open(config, "expert-iteration") as run:
        policy, tokenizer = load_policy(apply_warm_start(config, run.checkpoint), run.checkpoint)
        preflight(policy, tokenizer, run.path, config)
        questions, prompt_ids = fit_questions(questions, tokenizer, config)
        validation = fit_validation(validation, tokenizer, config)
        run.start_wandb()
        evaluator = Evaluator(config, run, tokenizer, validation.during)
        train(policy, tokenizer, questions, prompt_ids, evaluator, run, config)
        evaluator.evaluate_finally(policy, config.n_ei_steps, validation.final)
        report(run, config)
        run.finish()


def train(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Example],
    prompt_ids: Sequence[list[int]],
    evaluator: Evaluator,
    run: RunFolder,
    config: ExpertIterationConfig,
) -> None:
    """Run the expert iteration steps that are left."""
    optimizer, padding_id = prepare_training(policy, config), pad_token_id(tokenizer)
    num_steps, num_questions = config.n_ei_steps, config.ei_batch_size
    order = epoch_order(len(questions), num_steps * num_questions, config.seed)
    data = zip(prompt_ids, [question.ground_truth for question in questions], strict=True)
    with (
        TrainingLoop(policy, tokenizer, optimizer, data, num_steps, evaluator, run, config, "EI") as loop,
        thread_pool(NUM_WORKERS) as grading_threads,
    ):
        for step in loop:
            chosen = order[(step - 1) * num_questions : step * num_questions]

            # 1. Sync.
            with loop.phase("sync"):
                sync_metrics = evaluator.sync(policy)

            # 2. Sample.
            with loop.phase("rollout"):
                responses, wait_for_grades = sample_groups(
                    evaluator.llm, questions, prompt_ids, chosen, step, config, grading_threads
                )

            # 3. Grade, and keep the correct responses.
            with loop.phase("grade"):
                evaluator.sleep()
                grades = wait_for_grades()
                asked = [questions[index] for index in chosen]
                is_kept = choose_correct(asked, responses, grades, config)
                rollouts = make_rollouts(asked, responses, grades, [float(kept) for kept in is_kept], config.group_size)
            kept = [rollout for rollout in rollouts if rollout.advantage]
            if not kept:
                tqdm.write(
                    f"step {step}: none of {len(rollouts)} responses is correct, nothing to train on", file=sys.stdout
                )

            # 4. Supervised fine-tuning on them.
            with loop.phase("train"):
                rows = fine_tune(policy, optimizer, kept, padding_id, step, config)

            # 5. Log.
            of_step = summarize_step(rollouts, sync_metrics, loop.seconds, config) | {
                "ei_step": step,
                "rollout/num_kept": len(kept),
                "rollout/num_questions_with_correct": len({rollout.example for rollout in kept}),
            }
            loop.log([{"ei_step": step, **row} for row in rows], of_step)
            write_rollouts(run.path / "samples" / f"rollouts_{step:06d}.jsonl", rollouts, config)
            loop.show(reward=f"{of_step['rollout/reward']:.3f}", kept=len(kept))


def choose_correct(
    questions: Sequence[Example],
    responses: Sequence[Response],
    grades: Sequence[Grade],
    config: ExpertIterationConfig,
) -> list[bool]:
    """Return which responses are trained on: of each question's correct ones those that differ, or the first.

    SFT on them is a policy gradient with an advantage of 1 for these and 0 for the others.

    Args:
        questions: of the step. One that comes twice, where the order starts again, counts as one.
        responses: group_size to each question. Those of a group stand next to each other.
        grades: of the responses.
        config: `group_size` and `keep_correct`.
    """
    repeated = [question for question in questions for _ in range(config.group_size)]
    is_kept, seen = [], set()
    for question, response, grade in zip(repeated, responses, grades, strict=True):
        key = (question, tuple(response.token_ids) if config.keep_correct == "distinct" else None)
        is_kept.append(grade.rewards["answer_reward"] == 1 and key not in seen)
        if is_kept[-1]:
            seen.add(key)
    return is_kept


def fine_tune(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    kept: Sequence[Rollout],
    padding_id: int,
    step: int,
    config: ExpertIterationConfig,
) -> list[dict[str, float | int | None]]:
    """Take `ei_epochs` passes of SFT over the kept responses; return the metrics of each optimizer step.

    The last batch of a pass may be smaller. Its loss is the mean over its own rows.

    Raises:
        UserError: loss or gradient is NaN or infinite. The policy is left as it was before that optimizer step.
    """
    examples = [TokenizedExample(row.example, row.response.prompt_ids, row.response.token_ids) for row in kept]
    rows: list[dict[str, float | int | None]] = []
    for epoch in range(config.ei_epochs):
        order = epoch_order(len(kept), len(kept), derive_seed(config.seed, "batches", step, epoch))
        for start in range(0, len(kept), config.train_batch_size):
            batch = [examples[index] for index in order[start : start + config.train_batch_size]]
            accumulate = partial(accumulate_gradients, policy, batch, padding_id, config)
            metrics, grad_norm, loss_scale = compute_clipped_gradient(policy, accumulate, config)
            require_finite(step, metrics["train/loss"], grad_norm, "lower learning_rate")
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
