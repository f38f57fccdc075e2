"""Reinforcement learning with verified rewards (GRPO): `uv run python GRPO_train.py [key=value ...]` (--help).

Algorithm 3 of Stanford CS336 (Spring 2025), Assignment 5. Each step:

    sync the weights into vLLM; sample group_size responses to each question; grade them; normalize the rewards
    within groups; (off-policy only) score old log-probs once; optimizer steps over batches of the rollouts; log

Logged per optimizer step (axis `train_step`, counted in optimizer steps):
    train/loss                 as differentiated, summed over the microbatches
    train/grad_norm            before clipping
    train/loss_scale           see policy_evaluation.compute_clipped_gradient; 1 but in float16
    train/token_entropy        mean over the response tokens trained on, nats
    train/num_trained_rows     rows that passed through the policy: those with something to learn from
    train/ratio_mean, train/ratio_max, train/clip_fraction_low, train/clip_fraction_high
                               over the same tokens, for losses with a ratio or a clip
    train/learning_rate
Measured in the first optimizer step of a rollout batch, before the policy moves (null in later ones):
    rollout/log_prob_gap_mean, rollout/log_prob_gap_max, rollout/log_prob_gap_multiplicative
                               |engine - policy|, over the tokens trained on (off-policy: over all), but for the first
                               sampling_min_tokens of a response, sampled without EOS; multiplicative: exp(mean). It
                               proves that the engine sampled from the policy, given FEWEST_PROOF_TOKENS: above
                               max_sync_error the policy is not moved
Logged with the last optimizer step of a rollout batch:
    rollout/reward, rollout/format_reward, rollout/answer_reward   means over all responses
    rollout/reward_std_within_groups                               mean over groups of their sample std
    rollout/all_right_fraction, rollout/all_wrong_fraction         groups in which every answer is right, or none
    rollout/zero_advantage_fraction    responses with advantage exactly zero: they teach nothing (but for no_baseline,
                               whose weight is the reward)
    rollout/response_length[_correct|_incorrect|_max], rollout/truncated_fraction
    rollout/sync_multiplicative_error, rollout/sync_max_log_prob_difference    see policy_evaluation.check_policy_sync;
                               where responses do not come from the policy's own distribution and prove nothing
    reward/timeouts, reward/out_of_memory, reward/errors    answers that could not be compared; they count as wrong
    time/sync, time/rollout, time/grade, time/old_log_probs, time/train, time/step (their sum): seconds; responses are
                                       graded while others are sampled, grade is what remains of it afterwards, and
                                       on one GPU the engine's going to sleep meanwhile
    time/tokens_per_second             sampled, of the rollout phase
    memory/peak_gib
Logged per evaluation (axis `eval_step`, counted in rollout batches, as n_grpo_steps is): eval/*, see
policy_evaluation.evaluate_vllm; eval_all/*: the same on num_final_eval_examples questions, at the end.
As in the assignment there is no KL term. Difference from it: responses of advantage zero are skipped in forward and
backward, with all divisors unchanged, so that the gradient is the same.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from GRPO_helper import grpo_microbatch_train_step, normalize_within_groups
from math_data import (
    Example,
    epoch_order,
    final_validation_subset,
    hold_out,
    keep_answered,
    load_examples,
    load_validation_set,
    validation_subset,
)
from math_reward import Grade, count_failures, grade_response
from math_worker import NUM_WORKERS
from policy_evaluation import (
    Evaluator,
    Response,
    autocast,
    check_devices,
    compute_clipped_gradient,
    derive_seed,
    describe_evaluations,
    encode_prompts,
    load_policy,
    mean,
    peak_memory_gib,
    prepare_training,
    require_small_sync_error,
    sampling_params,
    score_responses,
    sleep_vllm_instance,
    stream_responses,
)
from prefix_tree import plan_microbatches, shares_prefixes
from run_checkpoint import TrainingState, fingerprint
from run_config import GRPOConfig, RolloutConfig, Stopped, UserError, load_config, read_yaml, run_main
from run_directory import Line, RunDirectory, plot_metrics
from run_guard import StopGuard
from SFT_helper import (
    get_masked_response_log_probs,
    join_prompt_and_response_ids,
    masked_normalize,
    pad_token_id,
    scale_gradient,
)

if TYPE_CHECKING:
    from vllm import LLM

RolloutConfigType = TypeVar("RolloutConfigType", bound=RolloutConfig)
FEWEST_PROOF_TOKENS = 128  # of fewer tokens the mean is not held against max_sync_error; evaluations prove the sync too


@dataclass
class Rollout:
    """One sampled response with what the update needs of it."""

    example: Example
    response: Response
    rewards: dict[str, float]
    advantage: float  # in expert iteration: 1 if the response is kept, else 0
    grading_failure: str | None = None
    old_log_probs: Tensor | None = None  # (number of response tokens,), of the policy that sampled

    @property
    def is_truncated(self) -> bool:
        """Whether the response was cut at the length limit."""
        return self.response.finish_reason == "length"


def main(arguments: list[str]) -> None:
    """Configuration, warm start, data, policy, evaluator, loop, results."""
    config = load_config(GRPOConfig, Path(__file__).with_name("grpo_train.yaml"), arguments)
    check_devices(config)
    validation_set = load_validation_set(config)
    validation_examples = validation_subset(validation_set, config)
    final_examples = final_validation_subset(validation_set, config)
    questions = load_questions(validation_set, config)
    with RunDirectory.open(config, "grpo") as run:
        print(f"run folder: {run.path}")
        policy, tokenizer = load_policy(config if run.checkpoint else apply_warm_start(config), run.checkpoint)
        prompt_ids = encode_prompts(questions, tokenizer, config)
        for examples_to_ask in (validation_examples, final_examples):  # too long: found before the engine starts
            encode_prompts(examples_to_ask, tokenizer, config)
        run.start_wandb()
        evaluator = Evaluator(config, run, tokenizer, validation_examples)
        train(policy, tokenizer, questions, prompt_ids, evaluator, run, config)
        evaluator.evaluate_finally(policy, config.n_grpo_steps, final_examples)
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
    config: GRPOConfig,
) -> None:
    """Run all GRPO steps that are left, evaluating before the first, every `eval_interval` and after the last."""
    optimizer = prepare_training(policy, config)
    padding_id = pad_token_id(tokenizer)
    order = epoch_order(len(questions), config.n_grpo_steps * config.num_questions_per_step, config.seed)
    truths = [question.ground_truth for question in questions]
    state = TrainingState(policy, tokenizer, optimizer, fingerprint(zip(prompt_ids, truths, strict=True)))
    num_steps = config.n_grpo_steps
    run.restore(state, num_steps)
    train_step = run.last_train_step()
    with StopGuard(state, run.save_checkpoint, run.path) as guard, thread_pool(NUM_WORKERS) as grading_threads:
        evaluator.keep_and_evaluate(state, num_steps)
        progress = tqdm(range(state.step + 1, num_steps + 1), "GRPO", num_steps, unit="step", initial=state.step)
        for step in progress:
            guard.stop_if_requested()
            seconds: dict[str, float] = {}
            with run.watched("sync", seconds):
                sync_metrics = evaluator.sync(policy, with_probes=not config.rollouts_prove_sync)

            first = (step - 1) * config.num_questions_per_step
            chosen = order[first : first + config.num_questions_per_step]
            with run.watched("rollout", seconds):
                responses, gradings = sample_groups(
                    evaluator.llm, questions, prompt_ids, chosen, step, config, grading_threads
                )
            with run.watched("grade", seconds):
                if config.shares_gpu:
                    sleep_vllm_instance(evaluator.llm)
                grades = [grading.result() for grading in gradings]
                rollouts = make_rollouts([questions[index] for index in chosen], responses, grades, config)
            with run.watched("old_log_probs", seconds):
                if config.is_off_policy:
                    score_old_log_probs(policy, rollouts, padding_id, config)
            guard.stop_if_requested()

            with run.watched("train", seconds):
                rows = update_policy(policy, optimizer, rollouts, padding_id, step, config)

            rows[-1] |= summarize_step(rollouts, sync_metrics, seconds, config)
            for row in rows:
                train_step += 1
                run.log({"train_step": train_step, **row})
                for advice in diagnose(row, config):
                    tqdm.write(f"step {step}: {advice}", file=sys.stdout)
            write_rollouts(run.path / "samples" / f"rollouts_{step:06d}.jsonl", rollouts, config)
            run.complete_step(state, step)
            guard.stop_if_requested()
            evaluator.keep_and_evaluate(state, num_steps)
            progress.set_postfix(reward=f"{rows[-1]['rollout/reward']:.3f}")
        guard.stop_if_requested()


@contextmanager
def thread_pool(num_threads: int) -> Iterator[Executor]:
    """Lend threads; unlike ThreadPoolExecutor's own `with`, an error does not wait for what is still queued."""
    threads = ThreadPoolExecutor(num_threads)
    try:
        yield threads
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def apply_warm_start(config: RolloutConfigType) -> RolloutConfigType:
    """Return the configuration with the warm start's final folder as the model; run SFT_train.py if it is absent.

    Raises:
        UserError: the SFT run failed, or the one that is there has another model, prompt, reward or task.
    """
    if not config.warm_start:
        return config
    folder = Path(config.runs_dir) / config.warm_start
    shared = {
        "model": config.model,
        "prompt": config.prompt,
        "reward": config.reward,
        "train_data": config.train_data,
        "validation_data": config.validation_data,
        "arithmetic_terms": list(config.arithmetic_terms),
        "arithmetic_max_term": config.arithmetic_max_term,
    }
    if (folder / "final").is_dir():
        used = read_yaml(folder / "config.yaml")
        different = [
            f"{name} = {used[name]}, not {value}" for name, value in shared.items() if used.get(name, value) != value
        ]
        if different:
            raise UserError(
                f"warm_start = {config.warm_start}: {folder} was trained with {'; '.join(different)}; remove it to "
                "train it again, or name another warm start"
            )
        print(f"warm start: {folder / 'final'}")
    else:
        print(f"warm start: {folder / 'final'} is not there yet; running SFT_train.py preset={config.warm_start} first")
        script = Path(__file__).with_name("SFT_train.py")
        settings = shared | {
            "preset": config.warm_start,
            "run_name": config.warm_start,
            "runs_dir": config.runs_dir,
            "wandb_mode": config.wandb_mode,
            "resume": "auto",
        }
        arguments = [f"{name}={value}" for name, value in settings.items()]
        process = subprocess.Popen([sys.executable, str(script), *arguments])
        try:
            status = process.wait()
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Stopped):  # it may have reached both processes, or this one alone
                process.send_signal(interrupt.status - 128)
            process.wait()  # it finishes its step and saves
            raise
        if status != 0:
            raise UserError(
                f"warm_start = {config.warm_start}: SFT_train.py ended with status {status}; mend what it says, or "
                f"remove {folder}, and try again"
            )
    return config.model_copy(update={"model": str(folder / "final")})


def load_questions(validation_set: Sequence[Example], config: RolloutConfig) -> list[Example]:
    """Return the training questions, those of the validation set left out.

    Raises:
        UserError: no question has an answer to grade against, or there are fewer questions than a step needs.
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


def sample_groups(
    llm: "LLM",
    questions: Sequence[Example],
    prompt_ids: Sequence[list[int]],
    chosen: Sequence[int],
    step: int,
    config: RolloutConfig,
    grading_threads: Executor,
) -> tuple[list[Response], list[Future[Grade]]]:
    """Sample `group_size` responses to each chosen question, those of a group next to each other.

    Returns:
        The responses, and the grade to come of each: grading begins when a response is finished, while the engine
        goes on with the others.
    """
    requests: list[tuple[int, int]] = []
    for place, index in enumerate(chosen):  # where the order starts again a question may come twice: with new samples
        first = list(chosen[:place]).count(index) * config.group_size
        requests += [(index, sample) for sample in range(first, first + config.group_size)]
    responses: dict[int, Response] = {}
    gradings: dict[int, Future[Grade]] = {}
    for position, response in stream_responses(
        llm,
        [prompt_ids[index] for index, _ in requests],
        sampling_params(config),
        [derive_seed(config.seed, "rollout", step, index, sample) for index, sample in requests],
    ):
        truth = questions[requests[position][0]].ground_truth or ""
        responses[position] = response
        gradings[position] = grading_threads.submit(grade_response, response.text, truth, config.reward)
    order = range(len(requests))
    return [responses[position] for position in order], [gradings[position] for position in order]


def make_rollouts(
    questions: Sequence[Example], responses: Sequence[Response], grades: Sequence[Grade], config: GRPOConfig
) -> list[Rollout]:
    """Normalize the rewards within groups, and join everything that the update needs of a response."""
    repeated = [question for question in questions for _ in range(config.group_size)]
    advantages = normalize_within_groups(
        torch.tensor([grade.rewards["reward"] for grade in grades]),
        config.group_size,
        config.advantage_eps,
        config.use_std_normalization and config.group_size > 1,
    )
    return [
        Rollout(example, response, grade.rewards, advantage, grade.failure)
        for example, response, grade, advantage in zip(repeated, responses, grades, advantages.tolist(), strict=True)
    ]


def score_old_log_probs(
    policy: PreTrainedModel, rollouts: Sequence[Rollout], padding_id: int, config: GRPOConfig
) -> None:
    """Score every rollout once with the policy that sampled it, before the policy moves."""
    responses = [rollout.response for rollout in rollouts]
    scores = score_responses(policy, responses, padding_id, config.scoring_batch_size, config.compute_dtype)
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
        UserError: loss or gradient is no number; the policy is left as it was before that optimizer step.
        SyncError: the responses were not sampled from this policy, which is left as it was.
    """
    rows = []
    gap: dict[str, float] = {}
    if config.is_off_policy and config.rollouts_prove_sync:
        gap = measure_gap(rollouts, old_log_probs_in(rollouts), config)
    for epoch in range(config.epochs_per_rollout_batch):
        order = epoch_order(len(rollouts), len(rollouts), derive_seed(config.seed, "batches", step, epoch))
        for start in range(0, len(rollouts), config.train_batch_size):
            batch = [rollouts[index] for index in order[start : start + config.train_batch_size]]
            proves_sync = config.rollouts_prove_sync and not config.is_off_policy
            accumulate = partial(accumulate_gradients, policy, batch, padding_id, config, proves_sync)
            sums, grad_norm, loss_scale = compute_clipped_gradient(policy, accumulate, config)
            if not rows:
                sums |= gap
            if not math.isfinite(sums["loss"]) or not math.isfinite(grad_norm):
                raise UserError(
                    f"step {step}: loss {sums['loss']}, gradient norm {grad_norm}; lower learning_rate, or set "
                    "loss_type=grpo_clip if the importance ratio exploded"
                )
            metrics = summarize_update(sums)
            error = metrics["rollout/log_prob_gap_multiplicative"]
            if error is not None and sums["num_gap_tokens"] >= FEWEST_PROOF_TOKENS:
                require_small_sync_error(error, config.max_sync_error)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            metrics |= {"train/grad_norm": grad_norm, "train/loss_scale": loss_scale}
            metrics["train/learning_rate"] = config.learning_rate
            rows.append(metrics)
    return rows


def summarize_update(sums: Mapping[str, float]) -> dict[str, float | None]:
    """Return the metrics of an optimizer step from its sums over response tokens; a mean over no token is None."""

    def per_token(name: str) -> float | None:
        return sums[name] / sums["num_tokens"] if name in sums else None

    gap_mean = sums["gap_sum"] / sums["num_gap_tokens"] if sums.get("num_gap_tokens") else None
    return {
        "train/loss": sums["loss"],
        "train/num_trained_rows": sums["num_trained_rows"],
        "train/token_entropy": per_token("entropy_sum"),
        "train/ratio_mean": per_token("ratio_sum"),
        "train/ratio_max": sums.get("ratio_max"),
        "train/clip_fraction_low": per_token("num_clipped_low"),
        "train/clip_fraction_high": per_token("num_clipped_high"),
        "rollout/log_prob_gap_mean": gap_mean,
        "rollout/log_prob_gap_multiplicative": None if gap_mean is None else torch.tensor(gap_mean).exp().item(),
        "rollout/log_prob_gap_max": None if gap_mean is None else sums["gap_max"],
    }


def accumulate_gradients(
    policy: PreTrainedModel,
    batch: Sequence[Rollout],
    padding_id: int,
    config: GRPOConfig,
    with_gap: bool = False,
    loss_scale: float = 1.0,
) -> dict[str, float]:
    """Add the gradient of one optimizer step, times loss_scale, to the parameters, microbatch by microbatch.

    Returns its sums over response tokens; the loss is not scaled.

    Rows without anything to learn from are skipped: an advantage (for no_baseline: a reward) of exactly zero, or,
    with `mask_truncated_responses`, a response that was cut. The divisors count the whole batch all the same; that of
    token_mean, the tokens of all responses that are not masked.
    """
    kept = [rollout for rollout in batch if not (config.mask_truncated_responses and rollout.is_truncated)]
    num_step_tokens = sum(len(rollout.response.token_ids) for rollout in kept)
    normalize_constant = {
        "masked_mean": None,
        "masked_normalize": float(config.sampling_max_tokens),
        "token_mean": float(num_step_tokens),
    }[config.length_normalization]
    rows = [rollout for rollout in kept if loss_weight(rollout, config) != 0]
    plan = plan_microbatches(
        [rollout.response.prompt_ids for rollout in rows],
        [rollout.response.token_ids for rollout in rows],
        config.microbatch_size,
        config.microbatch_tokens,
        shares_prefixes(policy),
    )
    if not rows:  # the gradient is zero, not absent: the optimizer's momentum moves on all the same
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
    sums: dict[str, float] = {"loss": 0.0, "num_tokens": 0.0, "num_trained_rows": float(len(rows))}
    for indices in plan:
        part = [rows[index] for index in indices]
        tensors = join_prompt_and_response_ids(
            [rollout.response.prompt_ids for rollout in part],
            [rollout.response.token_ids for rollout in part],
            padding_id,
        )
        tensors = {name: tensor.to(policy.device) for name, tensor in tensors.items()}
        mask = tensors["response_mask"]
        with autocast(policy, config.compute_dtype):
            scores = get_masked_response_log_probs(policy, **tensors, return_token_entropy=True)
        log_probs = scores["log_probs"]
        raw_rewards = torch.tensor([[rollout.rewards["reward"]] for rollout in part], device=policy.device)
        advantages = torch.tensor([[rollout.advantage] for rollout in part], device=policy.device)
        loss, metadata = grpo_microbatch_train_step(
            scale_gradient(log_probs, loss_scale),
            mask,
            config.gradient_accumulation_steps,  # num_step_rows stands in for it in the divisor
            config.loss_type,
            raw_rewards,
            advantages,
            old_log_probs=old_log_probs_of(part, log_probs, mask),
            cliprange=config.cliprange,
            length_normalization=config.length_normalization,
            normalize_constant=normalize_constant,
            num_step_rows=len(batch),
        )
        microbatch = {"loss": loss, "entropy_sum": masked_normalize(scores["token_entropy"], mask, 1.0), **metadata}
        if with_gap:
            microbatch |= measure_gap(part, log_probs.detach()[mask].cpu(), config)
        for name, value in microbatch.items():
            number = float(value)
            sums[name] = max(sums.get(name, number), number) if name.endswith("_max") else sums.get(name, 0.0) + number
    return sums


def measure_gap(rollouts: Sequence[Rollout], log_probs: Tensor, config: GRPOConfig) -> dict[str, float]:
    """Return sum and maximum of |engine - policy log-prob|, and over how many tokens.

    Args:
        rollouts: with the engine's log-probs.
        log_probs: the policy's, of all their response tokens one after the other, on the CPU.
        config: `sampling_min_tokens`: the first tokens of a response, which are left out, for the engine samples them
            from a distribution without EOS.
    """
    engine = torch.tensor([value for rollout in rollouts for value in rollout.response.log_probs])
    counts = torch.cat([torch.arange(len(row.response.token_ids)) >= config.sampling_min_tokens for row in rollouts])
    gap = (engine - log_probs).abs() * counts
    return {"gap_sum": gap.sum().item(), "gap_max": gap.max().item(), "num_gap_tokens": counts.sum().item()}


def loss_weight(rollout: Rollout, config: GRPOConfig) -> float:
    """Return what multiplies a response's log-probs in the loss: its reward for no_baseline, else its advantage."""
    return rollout.rewards["reward"] if config.loss_type == "no_baseline" else rollout.advantage


def old_log_probs_of(part: Sequence[Rollout], log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return the old log-probs in the shape of the new ones; on-policy they are the new ones, held fixed."""
    if part[0].old_log_probs is None:
        return log_probs.detach()
    return torch.zeros_like(log_probs).masked_scatter(mask, old_log_probs_in(part).to(log_probs))


def old_log_probs_in(rollouts: Sequence[Rollout]) -> Tensor:
    """Return the old log-probs of all response tokens, one response after the other."""
    return torch.cat([cast(Tensor, rollout.old_log_probs) for rollout in rollouts])


def summarize_step(
    rollouts: Sequence[Rollout], sync_metrics: Mapping[str, float], seconds: Mapping[str, float], config: RolloutConfig
) -> dict[str, float | None]:
    """Return what is logged once per rollout batch: its responses, the weight sync, the time of each phase, memory."""
    num_tokens = sum(len(rollout.response.token_ids) for rollout in rollouts)
    return {
        **summarize_rollouts(rollouts, config),
        **{f"rollout/{name}": value for name, value in sync_metrics.items()},
        **seconds,
        "time/step": sum(seconds.values()),
        "time/tokens_per_second": num_tokens / seconds["time/rollout"],
        "memory/peak_gib": peak_memory_gib(config.policy_device),
    }


def summarize_rollouts(rollouts: Sequence[Rollout], config: RolloutConfig) -> dict[str, float | None]:
    """Return the metrics of a rollout batch, over all its responses."""
    groups = torch.tensor([rollout.rewards["reward"] for rollout in rollouts]).view(-1, config.group_size)
    failures = count_failures([rollout.grading_failure for rollout in rollouts])
    lengths = [len(rollout.response.token_ids) for rollout in rollouts]
    right = [length for length, rollout in zip(lengths, rollouts, strict=True) if rollout.rewards["answer_reward"] == 1]
    wrong = [length for length, rollout in zip(lengths, rollouts, strict=True) if rollout.rewards["answer_reward"] != 1]
    return {
        "rollout/reward": groups.mean().item(),
        "rollout/format_reward": mean([rollout.rewards["format_reward"] for rollout in rollouts]),
        "rollout/answer_reward": mean([rollout.rewards["answer_reward"] for rollout in rollouts]),
        "rollout/reward_std_within_groups": groups.std(dim=1).mean().item() if config.group_size > 1 else None,
        "rollout/all_right_fraction": (groups == 1).all(dim=1).float().mean().item(),
        "rollout/all_wrong_fraction": (groups == 0).all(dim=1).float().mean().item(),
        "rollout/zero_advantage_fraction": mean([float(rollout.advantage == 0) for rollout in rollouts]),
        "rollout/response_length": mean(lengths),
        "rollout/response_length_correct": mean(right),
        "rollout/response_length_incorrect": mean(wrong),
        "rollout/response_length_max": max(lengths),
        "rollout/truncated_fraction": mean([float(rollout.is_truncated) for rollout in rollouts]),
        **{f"reward/{name}": count for name, count in failures.items()},
    }


def diagnose(metrics: Mapping[str, float | int | None], config: GRPOConfig) -> list[str]:
    """Return a sentence for each thing in a step's metrics that deserves a look."""

    def value(name: str) -> float:
        number = metrics.get(name)
        return 0.0 if number is None else float(number)

    advice = []
    if metrics.get("rollout/reward") == 0:
        if value("rollout/truncated_fraction") == 1:
            advice.append("every reward is zero and every response was cut: raise sampling_max_tokens")
        elif value("rollout/format_reward") == 0:
            advice.append("every reward is zero and no response keeps the format: start from a policy that knows it")
        else:
            advice.append("every reward is zero although the format is kept: the questions are too hard, or misgraded")
    elif value("rollout/zero_advantage_fraction") == 1 and config.loss_type != "no_baseline":
        advice.append("every advantage is zero: within each group all are right or all are wrong, nothing is learnt")
    if value("train/clip_fraction_low") + value("train/clip_fraction_high") > 0.3:
        advice.append("over 30 % of the tokens are clipped: lower learning_rate or epochs_per_rollout_batch")
    if value("train/grad_norm") > 100 * config.max_grad_norm:
        advice.append("the gradient norm is over 100 times its clip: lower learning_rate, look at the ratio")
    return advice


def write_rollouts(path: Path, rollouts: Sequence[Rollout], config: RolloutConfig) -> None:
    """Write the first groups of a rollout batch as JSON lines."""
    with path.open("w") as file:
        for rollout in rollouts[: config.num_logged_groups * config.group_size]:
            row = {
                "prompt": rollout.example.prompt,
                "response": rollout.response.text,
                "ground_truth": rollout.example.ground_truth,
                **rollout.rewards,
                "advantage": rollout.advantage,
                "response_length": len(rollout.response.token_ids),
                "finish_reason": rollout.response.finish_reason,
            }
            file.write(json.dumps(row) + "\n")


def report(run: RunDirectory, config: RolloutConfig) -> None:
    """Draw the run's figures and print its last lines."""
    rows = run.read_metrics()
    plot_metrics(
        {
            "validation reward": [
                Line(rows, "eval_step", "eval/answer_reward", "answer"),
                Line(rows, "eval_step", "eval/format_reward", "format"),
            ],
            "response length (tokens)": [Line(rows, "train_step", "rollout/response_length", "all")],
            "token entropy (nats)": [Line(rows, "train_step", "train/token_entropy", "trained tokens")],
            "gradient norm": [Line(rows, "train_step", "train/grad_norm", "before clipping")],
        },
        run.path / "training.png",
    )
    print(describe_evaluations(rows, config.sampling_temperature))


if __name__ == "__main__":
    run_main(main)
