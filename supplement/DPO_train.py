"""Direct preference optimization (DPO): `uv run python -m supplement.DPO_train [key=value ...]` (--help lists keys).

The supplement of Stanford CS336 (Spring 2025), Assignment 5, section 5.4. Before the first step, the policy scores
every pair once: these are the log-probs of the reference pi_ref. Each step:

    draw a batch of N pairs (prompt x, chosen y_w, rejected y_l), and take an optimizer step on

        L = - 1/N sum_i log sigma(beta (log pi(y_wi|x_i)/pi_ref(y_wi|x_i) - log pi(y_li|x_i)/pi_ref(y_li|x_i)))

The metrics are defined in docs/metrics.md, the method in docs/supplement.md.
Differences from the assignment: there is no second model in memory. Pairs of similar length share a pass, in which the
prompt of a pair is computed once.
"""

import plainrl.startup  # noqa: F401  # first: Ctrl-C during the imports shows no traceback

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plainrl.cli import load_config, run_main
from plainrl.data import epoch_order, fit_validation, load_validation
from plainrl.devices import check_devices, peak_memory_gib
from plainrl.distributed import add_up, join
from plainrl.log_probs import get_masked_response_log_probs
from plainrl.loop import TrainingLoop
from plainrl.microbatches import add_metrics, microbatches, rank_efficiency
from plainrl.policy import compute_clipped_gradient, load_policy, prepare_training, require_finite
from plainrl.precision import working_copy
from plainrl.preflight import preflight
from plainrl.report.curves import draw_training_figure
from plainrl.run_folder import RunFolder
from plainrl.run_records import describe_evaluations
from plainrl.supplement_config import DPOConfig
from plainrl.warm_start import apply_warm_start
from SFT_helper import masked_normalize, pad_token_id
from SFT_train import learning_rate_at
from supplement.DPO_helper import compute_dpo_loss
from supplement.preference_data import TokenizedPair, load_pairs, tokenize_pairs
from supplement.preference_scores import PairScore, PreferenceEvaluator, reference_scores

# What is said of a batch: means over its pairs, see `compute_dpo_loss`.
SUMMED = (
    *("loss", "accuracy", "reward_accuracy", "margin", "chosen_reward", "rejected_reward"),
    *("chosen_log_prob", "rejected_log_prob"),
)


def main(arguments: list[str]) -> None:
    """Configuration, pairs, warm start, policy, reference log-probs, evaluator, loop, results."""
    config = load_config(DPOConfig, Path(__file__).with_name("dpo_train.yaml"), arguments)
    check_devices(config)
    join(config)  # with the other ranks of torchrun, if there are any
    validation = load_validation(config) if config.validation_data else None
    pairs = load_pairs(validation.everything if validation else [], config)
    with RunFolder.open(config, "dpo") as run:
        first_config = apply_warm_start(config, run.checkpoint)
        policy, tokenizer = load_policy(first_config, run.checkpoint)
        preflight(policy, tokenizer, run.path, config)
        train_pairs, held_out = (tokenize_pairs(part, tokenizer, config) for part in pairs)
        validation = fit_validation(validation, tokenizer, config) if validation else None
        references = reference_scores(
            run,
            [*train_pairs, *held_out],
            pad_token_id(tokenizer),
            config,
            lambda: load_policy(apply_warm_start(config), for_training=False)[0] if run.checkpoint else policy,
        )
        run.start_wandb()
        evaluator = PreferenceEvaluator(
            config, run, tokenizer, held_out, references[len(train_pairs) :], validation.during if validation else []
        )
        num_steps = config.num_steps(len(train_pairs))
        train(policy, tokenizer, train_pairs, references[: len(train_pairs)], num_steps, evaluator, run, config)
        evaluator.evaluate_finally(policy, num_steps, validation.final if validation else [])
        report(run, config)
        run.finish()


def train(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[TokenizedPair],
    references: Sequence[PairScore],
    num_steps: int,
    evaluator: PreferenceEvaluator,
    run: RunFolder,
    config: DPOConfig,
) -> None:
    """Run the optimizer steps that are left."""
    order = epoch_order(len(pairs), num_steps * config.train_batch_size, config.seed)
    optimizer, padding_id = prepare_training(policy, config), pad_token_id(tokenizer)
    data = (pair[1:] for pair in pairs)  # the token ids
    with TrainingLoop(policy, tokenizer, optimizer, data, num_steps, evaluator, run, config, "DPO") as loop:
        for step in loop:
            # 1. Draw: the next batch of an order that runs through all pairs.
            chosen = order[(step - 1) * config.train_batch_size : step * config.train_batch_size]
            batch, scores = [pairs[index] for index in chosen], [references[index] for index in chosen]

            # 2. Update.
            learning_rate = learning_rate_at(step, num_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            with loop.phase("train"):
                accumulate = partial(accumulate_gradients, policy, batch, scores, padding_id, config)
                metrics, grad_norm, loss_scale = compute_clipped_gradient(policy, accumulate, config)
                sources = ", ".join(pair.pair.source for pair in batch[:8])
                require_finite(
                    step, metrics["train/loss"], grad_norm, f"lower learning_rate, or look at the batch: {sources}"
                )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            # 3. Log.
            num_tokens = sum(len(ids) for pair in batch for ids in (pair.prompt_ids, *pair[2:]))
            row = {
                **metrics,
                "train/loss_per_pair": metrics["train/loss"],
                "train/grad_norm": grad_norm,
                "train/loss_scale": loss_scale,
                "train/learning_rate": learning_rate,
                "train/epoch": step * config.train_batch_size / len(pairs),
                "time/step": loop.seconds["time/train"],
                "time/tokens_per_second": num_tokens / loop.seconds["time/train"],
                "memory/peak_gib": peak_memory_gib(config.policy_device),
            }
            loop.log([row])
            loop.show(loss=f"{metrics['train/loss']:.3f}", accuracy=f"{metrics['train/accuracy']:.2f}")


def accumulate_gradients(
    policy: PreTrainedModel,
    batch: Sequence[TokenizedPair],
    references: Sequence[PairScore],
    padding_id: int,
    config: DPOConfig,
    loss_scale: float = 1.0,
) -> dict[str, float]:
    """Add the gradient of a whole batch, times loss_scale, to the parameters, microbatch by microbatch.

    Returns:
        The metrics of the batch. The loss is not scaled.
    """
    prompts = [pair.prompt_ids for pair in batch for _ in range(2)]
    responses = [token_ids for pair in batch for token_ids in (pair.chosen_ids, pair.rejected_ids)]
    reference = torch.tensor(references, device=policy.device)
    sums: dict[str, float] = {}
    for part in microbatches(
        policy, prompts, responses, padding_id, 2 * config.microbatch_size, config.microbatch_tokens, rows_together=2
    ):
        mask = part.tensors["response_mask"]
        scores = get_masked_response_log_probs(working_copy(policy), **part.tensors)
        log_probs = masked_normalize(scores["log_probs"], mask, 1.0, dim=-1)
        chosen, rejected = log_probs[::2], log_probs[1::2]
        of_chosen, of_rejected = reference[[index // 2 for index in part.indices[::2]]].unbind(1)
        losses, metadata = compute_dpo_loss(chosen, rejected, of_chosen, of_rejected, config.beta)
        # This microbatch's share of the step's loss: the divisor counts the whole batch.
        loss = losses.sum() / len(batch)
        (loss * loss_scale * part.weight).backward()

        values = {"loss": losses.detach(), **metadata}
        values |= {"chosen_log_prob": chosen.detach(), "rejected_log_prob": rejected.detach()}
        add_metrics(sums, {name: value.sum() for name, value in values.items()} | {"num_tokens": mask.sum()}, part)
    sums = add_up(sums)
    means = {f"train/{name}": sums[name] / len(batch) for name in SUMMED}
    return means | {"train/num_response_tokens": int(sums["num_tokens"])} | rank_efficiency(sums)


def report(run: RunFolder, config: DPOConfig) -> None:
    """Draw the run's figures and print its last lines: what has changed."""
    draw_training_figure(run.path)
    rows = run.read_metrics()
    measured = [row for row in rows if row.get("eval/accuracy") is not None]
    first, last, best = measured[0], measured[-1], max(measured, key=lambda row: row["eval/accuracy"])
    print(
        f"{last['eval/num_pairs']} held-out pairs: the chosen response is likelier in {last['eval/accuracy']:.3f} of "
        f"them (before training {first['eval/accuracy']:.3f}, best {best['eval/accuracy']:.3f} at step "
        f"{best['eval_step']}); its reward is {last['eval/chosen_reward']:+.2f}, that of the rejected one "
        f"{last['eval/rejected_reward']:+.2f}"
    )
    if config.validation_data:
        print(describe_evaluations(rows, config.evaluation_temperature))


if __name__ == "__main__":
    run_main(main)
