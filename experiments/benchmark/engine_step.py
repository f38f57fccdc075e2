"""What needs the engine: tokens per second of rollouts, and the seconds of a whole GRPO step by phase.

    start        the engine, as GRPO_train.py starts it
    weights      copy the policy's weights into it; where both share a GPU, also sleep and wake
    GRPO step    the phases of GRPO_train.py, by its own functions. The responses are the engine's
    rollout      the same requests with and without log-probs, in turn

A random model answers nothing. So responses end after a stated number of tokens, and rewards and advantages are made
up. The engine's log-probs are compared with the policy's, as in a run.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

import GRPO_train
from experiments.benchmark.gpu_figures import Measured
from experiments.benchmark.gpu_settings import GPUBenchmarkConfig, make_inputs
from experiments.benchmark.measuring import timed
from experiments.benchmark.training_step import STEP, count_update, describe, spread_of
from plainrl.data import derive_seed
from plainrl.devices import check_devices, peak_memory_gib
from plainrl.engine import load_policy_into_vllm_instance, sample_responses, sampling_params, stream_responses
from plainrl.grading.rewards import NUM_WORKERS, grade_response
from plainrl.policy import load_policy, prepare_training
from plainrl.records import Response, Rollout, UserError
from plainrl.rollouts import thread_pool
from policy_evaluation import Evaluator
from SFT_helper import pad_token_id

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

GIB = 2**30


class OfStatedLengths:
    """Sampling settings whose clones end after so many tokens: the first after the first number, and so on.

    Args:
        params: everything else.
        lengths: tokens of each response.
    """

    def __init__(self, params: "SamplingParams", lengths: Sequence[int]) -> None:
        self._params, self._lengths = params, iter(lengths)

    def clone(self) -> "SamplingParams":
        """Return the settings of the next request."""
        params = self._params.clone()
        params.ignore_eos, params.max_tokens = True, next(self._lengths)
        return params


def why_no_engine(config: GPUBenchmarkConfig) -> str:
    """Return what is missing to start the engine, or "" if nothing is."""
    try:
        check_devices(config)
    except UserError as error:
        return str(error)
    return ""


def measure_engine(config: GPUBenchmarkConfig, peak: float) -> Iterator[Measured]:
    """Yield the figures of each part.

    Args:
        config: the settings of GRPO_train.py.
        peak: best rate of a matmul in compute_dtype, in TFLOP/s.
    """
    rollouts, _ = make_inputs(config)
    policy, tokenizer = load_policy(config)
    before, started = used_gib(config.device), time.perf_counter()
    evaluator = Evaluator(config, cast(Any, None), tokenizer, [])  # a run is only needed to log evaluations
    figures = {"start_seconds": time.perf_counter() - started}
    if config.shares_gpu:
        figures["sleeping_engine_gib"] = used_gib(config.device) - before
    yield Measured("start", "eager" if config.engine_eager else "compiled", figures)

    load_policy_into_vllm_instance(policy, evaluator.llm)  # the first copy takes longer
    figures = {"awake_engine_gib": used_gib(config.device) - before} if config.shares_gpu else {}
    yield Measured("weights", config.engine_dtype, figures | measure_weights(policy, evaluator, config))

    optimizer, padding_id = prepare_training(policy, config), pad_token_id(tokenizer)
    with thread_pool(NUM_WORKERS) as threads:
        take_step = partial(time_step, policy, optimizer, evaluator, rollouts, padding_id, threads, config)
        take_step()  # to warm up
        if config.device != "cpu":
            torch.cuda.reset_peak_memory_stats(config.device)
        steps = [take_step() for _ in range(config.num_engine_repetitions)]
    yield Measured("GRPO step", describe(config), summarize_steps(steps, policy, rollouts, config, peak))

    load_policy_into_vllm_instance(policy, evaluator.llm)  # it sleeps since the last step
    yield from measure_rollouts(evaluator.llm, rollouts, config)


def measure_weights(policy: PreTrainedModel, evaluator: Evaluator, config: GPUBenchmarkConfig) -> dict[str, float]:
    """Return the median seconds in which the engine, which is awake, sleeps, wakes up and takes over the weights."""

    def wake() -> None:
        torch.cuda.empty_cache()  # the engine cannot use memory that torch's allocator keeps
        evaluator.llm.wake_up()

    actions = {"sleep_seconds": evaluator.sleep, "wake_seconds": wake} if config.shares_gpu else {}
    actions["sync_seconds"] = partial(load_policy_into_vllm_instance, policy, evaluator.llm)
    cycles = [
        {name: timed(action, config.device) for name, action in actions.items()}
        for _ in range(config.num_engine_repetitions)
    ]
    return {name: statistics.median(cycle[name] for cycle in cycles) for name in actions}


def time_step(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    evaluator: Evaluator,
    rollouts: Sequence[Rollout],
    padding_id: int,
    grading_threads: Executor,
    config: GPUBenchmarkConfig,
) -> dict[str, float]:
    """Take a GRPO step and return the seconds of each phase. A phase holds what it holds in GRPO_train.py."""
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if config.device != "cpu":
            torch.cuda.synchronize(config.device)
        seconds[f"{name}_seconds"] = time.perf_counter() - started

    with phase("sync"):
        evaluator.sync(policy, with_probes=False)
    sampled: dict[int, Response] = {}
    gradings = []
    with phase("rollout"):
        requests = requests_for(rollouts, config)
        for index, response in stream_responses(evaluator.llm, *requests, config.has_engine_log_probs):
            sampled[index] = response
            gradings.append(grading_threads.submit(grade_response, response.text, "1", config.reward_function))
    with phase("grade"):
        evaluator.sleep()
        for grading in gradings:
            grading.result()
        batch = [replace(rollout, response=sampled[index]) for index, rollout in enumerate(rollouts)]
    with phase("old_log_probs"):
        if config.is_off_policy:
            GRPO_train.score_old_log_probs(policy, batch, padding_id, config)
    with phase("train"):
        GRPO_train.update_policy(policy, optimizer, batch, padding_id, STEP, config)
    return seconds | {"step_seconds": sum(seconds.values())}


def requests_for(rollouts: Sequence[Rollout], config: GPUBenchmarkConfig) -> tuple[list[list[int]], Any, list[int]]:
    """Return prompts, sampling settings and seeds of responses that are as long as the rollouts' own."""
    prompts = [rollout.response.prompt_ids for rollout in rollouts]
    lengths = [len(rollout.response.token_ids) for rollout in rollouts]
    seeds = [derive_seed(config.seed, "rollout", index) for index in range(len(rollouts))]
    return prompts, OfStatedLengths(sampling_params(config), lengths), seeds


def summarize_steps(
    steps: Sequence[dict[str, float]],
    policy: PreTrainedModel,
    rollouts: Sequence[Rollout],
    config: GPUBenchmarkConfig,
    peak: float,
) -> dict[str, Any]:
    """Return the median seconds of each phase, rates, and peak memory."""
    figures: dict[str, Any] = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    num_tokens = sum(len(rollout.response.token_ids) for rollout in rollouts)
    work = count_update(policy, rollouts, config)
    return figures | {
        "repetitions": len(steps),
        "sampled_tokens": num_tokens,
        "sampled_tokens_per_second": num_tokens / figures["rollout_seconds"],
        "trained_tokens_per_second": work.row_tokens / figures["train_seconds"],
        "training_mfu": work.tflop / figures["train_seconds"] / peak,
        "peak_gib": peak_memory_gib(config.device),
    }


def measure_rollouts(llm: "LLM", rollouts: Sequence[Rollout], config: GPUBenchmarkConfig) -> Iterator[Measured]:
    """Yield the rate of sampling with log-probs and without, measured in turn, with an empty prefix cache each time."""

    def sample(with_log_probs: bool) -> None:
        responses = sample_responses(llm, *requests_for(rollouts, config), with_log_probs)
        assert [len(row.token_ids) for row in responses] == [len(row.response.token_ids) for row in rollouts]

    settings, taken = {"with log-probs": True, "without log-probs": False}, []
    for _ in range(config.num_engine_repetitions):
        for with_log_probs in settings.values():
            llm.reset_prefix_cache()
            taken.append(timed(partial(sample, with_log_probs), config.device))
    num_tokens = sum(len(rollout.response.token_ids) for rollout in rollouts)
    for index, setting in enumerate(settings):
        figures = spread_of(taken[index :: len(settings)])
        rates = {"sampled_tokens_per_second": num_tokens / figures["seconds"]}
        yield Measured("rollout", setting, figures | {"sampled_tokens": num_tokens} | rates)


def used_gib(device: str) -> float:
    """Return how much of a card's memory is taken, by whomever, once torch has given back what it does not use."""
    if device == "cpu":
        return 0.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / GIB
