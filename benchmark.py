"""Ours against the peer, in turn, in one run on one machine.

    uv run python benchmark.py sft|grpo|rollout|logprob|grade|all [key=value ...]     (--help lists the keys)

    sft      SFT_train's optimizer step against TRL's SFTTrainer, as fast as it gets and with its default, gradient
             checkpointing: the same worked traces in every step, loss on the response; tokens per second counts the
             tokens of the examples, however they are computed
    grpo     a step of GRPO_train.py, as it logs it, against one of TRL's GRPOTrainer: the same questions, responses of
             exactly sampling_max_tokens tokens, no stop string, no KL term, one optimizer step; each pair has a seed
             of its own, for how many responses have no advantage, which ours skips, differs from draw to draw
    rollout  sample_responses against LLM.generate in the same engine: given the same requests, and given requests
             without seeds and log-probs
    logprob  old log-probs and training on made-up responses with advantage +1 or -1, none of them skipped; then with
             twice the questions, and with responses twice as long
    grade    grade_responses on arithmetic answers, right and wrong

Each side runs in a process of its own each turn (A B A B ...), so that peak memory is its own. The first step of each
process is a warm-up and is not timed. In one more step of sft, and of ours in logprob, when times and memory have been
taken (counting keeps tensors alive), the floating-point operations of matrix products are counted as they are executed,
recomputation included, fused attention on the CPU (some 3 %) not. mfu is their rate in the steps that are timed, over
the best rate of a plain bfloat16 product on this machine, measured anew before each turn.

Written to results_dir: benchmark.csv (one line per figure), benchmark.png, environment.json; see its README.md. What is
not measured now stays as it was, unless it is another machine's.
"""

import csv
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

import GRPO_train
import SFT_train
from math_data import Example, epoch_order, load_prompt_template, load_sft_examples, load_validation_set
from math_reward import grade_responses
from policy_evaluation import (
    Response,
    compute_clipped_gradient,
    encode_prompts,
    init_vllm,
    load_policy,
    peak_memory_gib,
    prepare_training,
    resolve_model,
    sample_responses,
    sampling_params,
)
from run_config import EMBEDDED_DATA, GRPOConfig, SFTConfig, UserError, load_config, run_main
from run_directory import describe_environment, read_metrics
from SFT_helper import pad_token_id

HERE = Path(__file__).parent
TRL = "trl==1.16.0"
TRL_NEEDS = ("torch", "transformers", "datasets", "accelerate")  # in the versions that ours runs with
QWEN = "Qwen/Qwen2.5-Math-1.5B"
RANDOM_MODEL = "random-1.5b"
QWEN_SHAPE = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)
NUM_PROBES = 8  # questions of the validation set that GRPO_train.py is given: those that prove the weight sync
TRL_CHECKPOINTING = "trl, checkpointing"  # with its default, which takes less memory and more time
TURNS = {
    "sft": ("ours", "trl", TRL_CHECKPOINTING),
    "grpo": ("ours", "trl"),
    "rollout": ("ours",),
    "logprob": ("ours", "twice the questions", "twice the length"),
    "grade": ("ours",),
}
SCALED = ("logprob",)  # the other sides are ours, with more to do
SFT_RATE = ("sft", "tokens_per_second")
PHASES = ("sync", "rollout", "grade", "old_log_probs", "train")
UNITS = {  # by how a figure's name ends; 1: none
    "tokens_per_second": "tokens/s",
    "responses_per_second": "responses/s",
    "tflop_per_second": "TFLOP/s",
    "tflop": "TFLOP",
    "seconds": "s",
    "gib": "GiB",
    "": "1",
}
Figures = dict[str, float]


class BenchmarkConfig(GRPOConfig):
    """The keys of GRPO_train.py, which set the size of a step, and those of the benchmark."""

    num_pairs: int = Field(3, ge=1, description="turns of each side")
    num_measured_steps: int = Field(2, ge=1, description="timed SFT steps per turn; a figure is their median")
    num_grpo_steps: int = Field(1, ge=1, description="timed GRPO steps per turn; a figure is their median")
    sft_batch_size: int = Field(32, ge=1, description="examples per SFT step")
    num_logprob_questions: int = Field(8, ge=1, description="questions of the logprob benchmark, group_size each")
    trl_sft_microbatch: int = Field(8, ge=1, description="examples per forward pass of TRL's SFTTrainer")
    trl_grpo_microbatch: int = Field(8, ge=1, description="responses per forward pass of TRL's GRPOTrainer")
    results_dir: str = Field("", description="folder of the results; empty: results/benchmark, -PRESET but for laptop")
    given: list[str] = Field([], description="the keys on the command line; benchmark.py fills it in")


class Row(NamedTuple):
    """One measured figure."""

    benchmark: str
    side: str
    pair: int
    figure: str
    unit: str
    value: float


class Summary(NamedTuple):
    """Minimum, median and maximum of a figure over the pairs, and of ours / this side (in SCALED: this side / ours)."""

    benchmark: str
    figure: str
    unit: str
    side: str
    spread: tuple[float, float, float]
    ratio: tuple[float, float, float] | None


def main(arguments: list[str]) -> None:
    """Take all turns of the benchmarks named, write the results, print them."""
    if arguments[:1] == ["worker"]:
        work(Path(arguments[1]), Path(arguments[2]))
        return
    names = list(TURNS) if arguments[:1] == ["all"] else arguments[:1]
    if not names or names[0] not in (*TURNS, "--help"):
        raise UserError(f"usage: benchmark.py {'|'.join(TURNS)}|all [key=value ...]; --help lists the keys")
    config = load_config(BenchmarkConfig, HERE / "grpo_train.yaml", names if "--help" in names else arguments[1:])
    config = choose_model(config)
    config = config.model_copy(update={"given": [argument.partition("=")[0] for argument in arguments[1:]]})
    if Path(config.model).name == RANDOM_MODEL and "grpo" in names:
        print("grpo is left out: a random model is never right, and a step of ours would train on nothing")
        names = [name for name in names if name != "grpo"]
    started_from = GRPO_train.apply_warm_start(config) if {"grpo", "rollout", "logprob"} & set(names) else config
    warm_config = config.model_copy(update={"model": started_from.model})
    folder = Path(config.results_dir or f"results/benchmark{'' if config.preset == 'laptop' else f'-{config.preset}'}")
    folder.mkdir(parents=True, exist_ok=True)
    discard_another_machines(folder)
    peer: dict[str, Any] = {}
    for name in names:
        rows = measure(name, config if name == "sft" else warm_config, peer)
        kept = read_rows(folder / "benchmark.csv") if (folder / "benchmark.csv").exists() else []
        write_rows(folder / "benchmark.csv", [row for row in kept if row.benchmark != name] + rows)
    rows = read_rows(folder / "benchmark.csv")
    record_environment(folder / "environment.json", names, config, peer)
    plot(rows, folder / "benchmark.png")
    print("\n".join(table(summarize([row for row in rows if row.benchmark in names]))))


def measure(name: str, config: BenchmarkConfig, peer: dict[str, Any]) -> list[Row]:
    """Return the figures of one benchmark; `peer` receives the peer's versions and settings."""
    rows = []
    for pair in range(1, config.num_pairs + 1):
        of_pair = config.model_copy(update={"seed": config.seed + pair - 1})
        for turn in TURNS[name]:
            peak = matmul_peak(config.policy_device)
            for side, figures in take_turn(name, turn, of_pair, peer).items():
                if "tflop_per_second" in figures:
                    figures |= {"matmul_peak_tflop_per_second": peak, "mfu": figures["tflop_per_second"] / peak}
                rows += [Row(name, side, pair, figure, unit_of(figure), value) for figure, value in figures.items()]
                values = ", ".join(f"{figure} {value:.4g}" for figure, value in figures.items())
                print(f"{name}, pair {pair} of {config.num_pairs}, {side}: {values}", flush=True)
    return rows


def take_turn(name: str, turn: str, config: BenchmarkConfig, peer: dict[str, Any]) -> dict[str, Figures]:
    """Run one side in a process of its own; return its figures, by side.

    Raises:
        UserError: the process failed; shows the end of what it wrote.
    """
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        task, result, log = folder / "task.json", folder / "result.json", folder / "log.txt"
        environment: dict[str, str] = {}
        is_peer = turn.startswith("trl")
        if is_peer:
            task.write_text(json.dumps(trl_task(name, turn, config, folder)))
            needs = [TRL, *(f"{package}=={importlib.metadata.version(package)}" for package in TRL_NEEDS)]
            date = tomllib.loads((HERE / "pyproject.toml").read_text())["tool"]["uv"]["exclude-newer"]
            command = ["uv", "run", "--no-project", "--python", "3.11", "--exclude-newer", date]
            command += [part for need in needs for part in ("--with", need)]
            command += ["python", str(HERE / "benchmark_trl.py"), str(task), str(result)]
            environment = only_visible(config.policy_device, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        else:
            task.write_text(json.dumps({"benchmark": name, "turn": turn, "config": config.model_dump(mode="json")}))
            command = [sys.executable, str(HERE / "benchmark.py"), "worker", str(task), str(result)]
        with log.open("w") as file:
            process = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment, check=False
            )
        if process.returncode != 0:
            ending = " | ".join(log.read_text().splitlines()[-4:])
            raise UserError(f"{name}, {turn}: status {process.returncode}: {ending}")
        answer = json.loads(result.read_text())
    if not is_peer:
        return answer
    peer |= {"versions": answer["versions"], f"{name}, {turn}": answer["settings"]}
    return {turn: answer["figures"]}


def only_visible(device: str, visible: str) -> dict[str, str]:
    """Return what of the environment lets a process see one device alone: TRL takes all GPUs that it sees.

    >>> only_visible("cuda:1", "4,5"), only_visible("cuda:1", ""), only_visible("cpu", "")
    ({'CUDA_VISIBLE_DEVICES': '5'}, {'CUDA_VISIBLE_DEVICES': '1'}, {})
    """
    if device == "cpu":
        return {}
    number = int(device.removeprefix("cuda:"))
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[number] if visible else str(number)}


# --- ours, each in a process of its own ------------------------------------------------------------------------


def work(task_path: Path, result_path: Path) -> None:
    """Take the turn that a task file describes; write its figures, by side."""
    task = json.loads(task_path.read_text())
    config = BenchmarkConfig.model_validate(task["config"])
    result_path.write_text(json.dumps(WORKERS[task["benchmark"]](config, task["turn"])))


def work_sft(config: BenchmarkConfig, turn: str) -> dict[str, Figures]:
    """Time SFT_train's optimizer step."""
    settings = sft_settings(config)
    policy, tokenizer = load_policy(settings)
    batch = SFT_train.tokenize_examples(sft_examples(settings), tokenizer, settings)
    optimizer = prepare_training(policy, settings)
    accumulate = partial(SFT_train.accumulate_gradients, policy, batch, pad_token_id(tokenizer), settings)

    def step() -> None:
        compute_clipped_gradient(policy, accumulate, settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    seconds = statistics.median(timed(step, settings.policy_device) for _ in range(config.num_measured_steps))
    peak_memory = peak_memory_gib(settings.policy_device)
    tflop = count_tflop(step)
    return {
        "ours": {
            "tokens_per_second": sum(len(row.prompt_ids) + len(row.response_ids) for row in batch) / seconds,
            "step_seconds": seconds,
            "computed_tflop": tflop,
            "tflop_per_second": tflop / seconds,
            "peak_memory_gib": peak_memory,
        }
    }


def work_grpo(config: BenchmarkConfig, turn: str) -> dict[str, Figures]:
    """Run GRPO_train.py for a warm-up step and those that are measured; its own metrics are the figures."""
    Path(config.runs_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.runs_dir) as name:  # it saves a checkpoint after the last step
        settings = grpo_settings(config, Path(name))
        own_keys = BenchmarkConfig.model_fields.keys() - GRPOConfig.model_fields.keys()
        path = Path(name) / "grpo.yaml"
        path.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude=own_keys) | {"preset": "auto"}))
        GRPO_train.main([f"config={path}"])
        rows = [row for row in read_metrics(Path(name) / "grpo") if "time/step" in row][1:]

    def median(key: str) -> float:
        return statistics.median(row[key] for row in rows)

    return {
        "ours": {
            "step_seconds": median("time/step"),
            **{f"{phase}_seconds": median(f"time/{phase}") for phase in PHASES},
            "sync_fraction": statistics.median(row["time/sync"] / row["time/step"] for row in rows),
            "sampled_tokens_per_second": median("time/tokens_per_second"),
            "num_trained_rows": median("train/num_trained_rows"),
            "reward": median("rollout/reward"),
            "peak_memory_gib": rows[-1]["memory/peak_gib"],
        }
    }


def work_rollout(config: BenchmarkConfig, turn: str) -> dict[str, Figures]:
    """Sample the same rollout batch by sample_responses and by LLM.generate, with a cold prefix cache each time."""
    settings = config.model_copy(update=exact_length(config))
    folder = resolve_model(settings.model)
    questions = GRPO_train.load_questions([], settings)[: settings.num_questions_per_step]
    prompt_ids = encode_prompts(questions, AutoTokenizer.from_pretrained(folder), settings)
    prompt_ids = [ids for ids in prompt_ids for _ in range(settings.group_size)]
    llm = init_vllm(
        folder,
        settings.evaluator_device,
        settings.seed,
        settings.gpu_memory_utilization,
        dtype=settings.engine_dtype,
        max_model_len=settings.max_context_tokens,
        cpu_cache_gib=settings.engine_cache_gib,
        enforce_eager=settings.engine_eager,
    )
    params, seeds = sampling_params(settings), range(len(prompt_ids))
    requests = [params.clone() for _ in seeds]
    for seed, request in zip(seeds, requests, strict=True):
        request.seed, request.logprobs = seed, 0
    prompts: Any = [{"prompt_token_ids": ids} for ids in prompt_ids]
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: sample_responses(llm, prompt_ids, params, seeds),
        "LLM.generate": lambda: llm.generate(prompts, requests, use_tqdm=False),
        "LLM.generate, no seeds, no log-probs": lambda: llm.generate(prompts, params, use_tqdm=False),
    }
    sides["ours"]()
    num_tokens, figures = len(prompt_ids) * settings.sampling_max_tokens, {}
    for side, sample in sides.items():
        llm.reset_prefix_cache()
        figures[side] = {"sampled_tokens_per_second": num_tokens / timed(sample, settings.policy_device)}
    return figures


def work_logprob(config: BenchmarkConfig, turn: str) -> dict[str, Figures]:
    """Time old log-probs and training on made-up responses to the training questions, every one of them trained on."""
    num_questions = config.num_logprob_questions * (2 if turn == "twice the questions" else 1)
    length = config.sampling_max_tokens * (2 if turn == "twice the length" else 1)
    policy, tokenizer = load_policy(config)
    questions = GRPO_train.load_questions([], config)[:num_questions]
    prompt_ids = encode_prompts(questions, tokenizer, config)
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for index in range(num_questions * config.group_size):
        token_ids = torch.randint(policy.config.vocab_size, (length,), generator=generator).tolist()
        question = index // config.group_size
        response = Response(prompt_ids[question], "", token_ids, [0.0] * length, "length")
        rollouts.append(GRPO_train.Rollout(questions[question], response, {"reward": 0.0}, 1.0 - 2 * (index % 2)))
    optimizer, padding_id = prepare_training(policy, config), pad_token_id(tokenizer)

    num_microbatches = max(len(rollouts) // config.microbatch_size, 1)
    update = {"train_batch_size": len(rollouts), "gradient_accumulation_steps": num_microbatches}
    update |= {"max_sync_error": math.inf}  # no engine has sampled these responses
    settings = config.model_copy(update=update)

    def score() -> None:
        GRPO_train.score_old_log_probs(policy, rollouts, padding_id, settings)

    def train() -> None:
        GRPO_train.update_policy(policy, optimizer, rollouts, padding_id, 1, settings)

    score()
    train()
    figures = {
        "old_log_probs_seconds": timed(score, config.policy_device),
        "train_seconds": timed(train, config.policy_device),
        "peak_memory_gib": peak_memory_gib(config.policy_device),
    }
    figures["both_seconds"] = figures["old_log_probs_seconds"] + figures["train_seconds"]
    if turn == "ours":
        figures["computed_tflop"] = count_tflop(score) + count_tflop(train)
        figures["tflop_per_second"] = figures["computed_tflop"] / figures["both_seconds"]
    return {turn: figures}


def work_grade(config: BenchmarkConfig, turn: str) -> dict[str, Figures]:
    """Grade a batch of answers, every other one wrong: the best of twenty times."""
    truths = [example.ground_truth or "" for example in load_validation_set(config)][: config.rollout_batch_size]
    answers = [truth if index % 2 else f"{truth}1" for index, truth in enumerate(truths)]
    responses = [f" So it is {answer}. </think> <answer> {answer} </answer>" for answer in answers]
    grades = grade_responses(responses, truths, config.reward)
    assert [grade.rewards["reward"] for grade in grades] == [index % 2 for index in range(len(truths))]
    seconds = min(timed(lambda: grade_responses(responses, truths, config.reward), "cpu") for _ in range(20))
    return {"ours": {"graded_responses_per_second": len(truths) / seconds}}


WORKERS: dict[str, Callable[[BenchmarkConfig, str], dict[str, Figures]]] = {
    "sft": work_sft,
    "grpo": work_grpo,
    "rollout": work_rollout,
    "logprob": work_logprob,
    "grade": work_grade,
}


# --- the same work for both sides ------------------------------------------------------------------------------


def sft_settings(config: BenchmarkConfig) -> SFTConfig:
    """Return SFT_train.py's settings for the preset, with what differs from it here, and the benchmark's batch size."""
    arguments = [f"preset={config.preset}", f"train_data={EMBEDDED_DATA}", "keep_best=false"]
    settings = load_config(SFTConfig, HERE / "config.yaml", arguments)
    given = [name for name in config.given if name in SFTConfig.model_fields]
    update = {name: getattr(config, name) for name in ("model", *given)} | {
        "train_batch_size": config.sft_batch_size,
        "max_context_tokens": config.max_context_tokens,
    }
    return settings.model_copy(update=update)


def sft_examples(settings: SFTConfig) -> list[Example]:
    """Return the worked traces of one step."""
    return load_sft_examples(settings)[: settings.train_batch_size]


def exact_length(config: BenchmarkConfig) -> dict[str, Any]:
    """Return the settings that make every response as long as it may be: TRL knows no stop string."""
    return {"stop_string": "", "sampling_min_tokens": config.sampling_max_tokens}


def grpo_settings(config: BenchmarkConfig, folder: Path) -> BenchmarkConfig:
    """Return GRPO_train.py's settings for a run in a folder, with next to no evaluation."""
    probes = folder / "probes.jsonl"
    rows = [{"problem": e.question, "answer": e.ground_truth} for e in load_validation_set(config)[:NUM_PROBES]]
    probes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    update = exact_length(config) | {
        "n_grpo_steps": 1 + config.num_grpo_steps,
        "validation_data": str(probes),
        "num_eval_examples": "all",
        "eval_interval": 1000,
        "checkpoint_interval": 1000,
        "runs_dir": str(folder),
        "run_name": "grpo",
        "warm_start": "",
        "wandb_mode": "disabled",
    }
    return config.model_copy(update=update)


def trl_task(name: str, turn: str, config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    """Return what benchmark_trl.py needs to do the work of `work_sft` or `work_grpo`."""
    settings = sft_settings(config) if name == "sft" else grpo_settings(config, folder)
    task = {
        "benchmark": name,
        "model": str(Path(resolve_model(config.model)).absolute()),
        "device": config.policy_device,
        "batch_size": settings.train_batch_size,
        "num_measured_steps": config.num_measured_steps if name == "sft" else config.num_grpo_steps,
        "learning_rate": settings.learning_rate,
        "adam_betas": settings.adam_betas,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": turn == TRL_CHECKPOINTING,
    }
    if isinstance(settings, SFTConfig):
        tokenizer = AutoTokenizer.from_pretrained(task["model"])
        batch = SFT_train.tokenize_examples(sft_examples(settings), tokenizer, settings)
        return task | {
            "microbatch_size": min(config.trl_sft_microbatch, settings.train_batch_size),
            "max_length": settings.max_context_tokens,
            "prompt_ids": [row.prompt_ids for row in batch],
            "response_ids": [row.response_ids for row in batch],
        }
    questions = GRPO_train.load_questions(load_validation_set(settings), settings)
    num_draws = settings.n_grpo_steps * settings.num_questions_per_step
    chosen = [questions[index] for index in epoch_order(len(questions), num_draws, settings.seed)]
    return task | {
        "microbatch_size": min(config.trl_grpo_microbatch, settings.train_batch_size),
        "group_size": settings.group_size,
        "response_tokens": settings.sampling_max_tokens,
        "temperature": settings.sampling_temperature,
        "reward": settings.reward,
        "prompts": [example.prompt for example in chosen],
        "ground_truths": [example.ground_truth for example in chosen],
    }


def choose_model(config: BenchmarkConfig) -> BenchmarkConfig:
    """Return the configuration with the embedded data, and a model that is there.

    Where the preset's model is not in the local hub cache, a randomly initialized one of Qwen2.5-Math-1.5B's shape
    stands in for it: as fast, but never right, so that there is nothing for GRPO to learn from.
    """
    config = config.model_copy(update={"train_data": EMBEDDED_DATA, "validation_data": EMBEDDED_DATA})
    if config.model != QWEN:
        return config
    try:
        resolve_model(config.model)
    except UserError:
        folder = Path(config.runs_dir) / RANDOM_MODEL
        if not folder.is_dir():
            make_random_model(folder)
        return config.model_copy(update={"model": str(folder)})
    return config


def make_random_model(folder: Path) -> None:
    """Write a model of Qwen2.5-Math-1.5B's exact shape with random weights, and a tokenizer of the embedded data."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<eos>"], initial_alphabet=alphabet)
    template = load_prompt_template("r1_zero")
    tokenizer.train_from_iterator([template] * 100, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(QWEN_SHAPE, dtype=torch.bfloat16).save_pretrained(folder)


# --- measuring and reporting -----------------------------------------------------------------------------------


def timed(action: Callable[[], object], device: str) -> float:
    """Return the seconds that an action takes."""
    started = time.perf_counter()
    action()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def count_tflop(action: Callable[[], object]) -> float:
    """Return the floating-point operations of an action's matrix products, in units of 10^12."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops() / 1e12


def matmul_peak(device: str) -> float:
    """Return the best rate of a square bfloat16 matrix product, in TFLOP/s, over sizes and repetitions."""
    best = 0.0
    for size in (1024, 2048, 4096) if device == "cpu" else (4096, 8192):
        left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        for _ in range(4):  # the first is a warm-up, never the best
            best = max(best, 2e-12 * size**3 / timed(lambda operand=left: operand @ operand, device))
    return best


def unit_of(figure: str) -> str:
    """Return the unit of a figure, which its name ends in.

    >>> unit_of("peak_memory_gib"), unit_of("mfu")
    ('GiB', '1')
    """
    return next(unit for ending, unit in UNITS.items() if figure.endswith(ending))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write figures as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows([*row[:-1], f"{row.value:.6g}"] for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Return the figures in a CSV file."""
    with path.open(newline="") as file:
        return [Row(r[0], r[1], int(r[2]), r[3], r[4], float(r[5])) for r in list(csv.reader(file))[1:]]


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Return minimum, median and maximum of each figure of each side, and of the ratios pair by pair."""
    values: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        values.setdefault((row.benchmark, row.figure, row.side), {})[row.pair] = row.value
    summaries = []
    for (benchmark, figure, side), pairs in values.items():
        ours = values.get((benchmark, figure, "ours"), {})
        shared = [pair for pair in pairs if side != "ours" and ours.get(pair) and pairs[pair]]
        ratios = [pairs[p] / ours[p] if benchmark in SCALED else ours[p] / pairs[p] for p in shared]
        summaries.append(
            Summary(
                benchmark, figure, unit_of(figure), side, spread(pairs.values()), spread(ratios) if ratios else None
            )
        )
    return summaries


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Return minimum, median, maximum."""
    values = list(values)
    return min(values), statistics.median(values), max(values)


def table(summaries: Sequence[Summary]) -> list[str]:
    """Return the lines of a Markdown table, those of a figure next to each other."""
    lines = [
        "| benchmark | figure | unit | side | minimum | median | maximum | ratio: minimum, median, maximum |",
        "|---|---|---|---|---|---|---|---|",
    ]
    figures = list(dict.fromkeys((summary.benchmark, summary.figure) for summary in summaries))
    for row in sorted(summaries, key=lambda row: figures.index((row.benchmark, row.figure))):
        ratio = ", ".join(f"{value:.3g}" for value in row.ratio or ())
        numbers = " | ".join(f"{value:.4g}" for value in row.spread)
        lines.append(f"| {row.benchmark} | {row.figure} | {row.unit} | {row.side} | {numbers} | {ratio} |")
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw where a GRPO step's time goes, as stacked bars, and SFT's tokens per second: medians, of what there is."""
    from matplotlib.figure import Figure

    medians = {(row.benchmark, row.figure, row.side): row.spread[1] for row in summarize(rows)}
    drawings = {"grpo": _draw_steps, "sft": _draw_tokens}
    measured = [name for name in drawings if any(row.benchmark == name for row in rows)]
    if not measured:
        return
    figure = Figure(figsize=(4.5 * len(measured), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        drawings[name](axes, medians)
    figure.savefig(path, dpi=120)


def _draw_steps(axes: Any, medians: Mapping[tuple[str, str, str], float]) -> None:
    bottoms = dict.fromkeys(TURNS["grpo"], 0.0)
    for phase in PHASES:
        heights = [medians.get(("grpo", f"{phase}_seconds", side), 0.0) for side in bottoms]
        if any(heights):
            axes.bar(list(bottoms), heights, bottom=list(bottoms.values()), label=phase.replace("_", " "), width=0.6)
        bottoms = {side: bottoms[side] + height for side, height in zip(bottoms, heights, strict=True)}
    for index, total in enumerate(bottoms.values()):
        axes.text(index, total, f"{total:.1f} s", ha="center", va="bottom")
    axes.set(title="one GRPO step", ylabel="seconds")
    axes.legend()


def _draw_tokens(axes: Any, medians: Mapping[tuple[str, str, str], float]) -> None:
    rates = {side: rate for (name, figure, side), rate in medians.items() if (name, figure) == SFT_RATE}
    axes.bar_label(axes.bar(list(rates), list(rates.values()), width=0.6), fmt="%.0f")
    axes.set(title="SFT", ylabel="tokens of the examples per second")


def discard_another_machines(folder: Path) -> None:
    """Remove what a folder has of another machine: its figures are not to be held against this one's."""
    path = folder / "environment.json"
    if path.exists():
        recorded, here = json.loads(path.read_text()), describe_environment()
        if any((recorded.get(name) or None) != (here[name] or None) for name in ("cpu", "cpu_count", "cuda_devices")):
            print(f"{folder}: figures of another machine ({recorded.get('cpu')}) are removed; results_dir= keeps them")
            path.unlink()
            (folder / "benchmark.csv").unlink(missing_ok=True)


def record_environment(path: Path, names: Sequence[str], config: BenchmarkConfig, peer: dict[str, Any]) -> None:
    """Write machine, versions and settings of both sides; those of benchmarks not measured now stay as they were."""
    left_out = ("command", "git_diff", "host")
    record = {name: value for name, value in describe_environment().items() if name not in left_out}
    before = json.loads(path.read_text()) if path.exists() else {}
    settings = {name: sft_settings(config) if name == "sft" else config for name in names}
    ours = {name: config.model_dump(mode="json", exclude={"results_dir"}) for name, config in settings.items()}
    record |= {"ours": before.get("ours", {}) | ours, "peer": before.get("peer", {}) | peer}
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
