"""This code against TRL, in turn, in one run on one machine.

    uv run python -m experiments.benchmark sft|grpo|rollout|logprob|grade|all [key=value ...]

`--help` lists the keys.

    sft      An optimizer step of SFT_train.py against one of TRL's SFTTrainer. TRL runs twice: as fast as it gets, and
             with its default, gradient checkpointing. Every step has the same worked traces and the loss on the
             response. Tokens per second counts the tokens of the examples, however they are computed.
    grpo     A step of GRPO_train.py, as it logs it, against one of TRL's GRPOTrainer: the same questions, responses of
             exactly sampling_max_tokens tokens, no stop string, no KL term, one optimizer step. Ours skips responses
             without an advantage. Their number differs from draw to draw, so each pair has a seed of its own.
    rollout  sample_responses against LLM.generate in the same engine: with the same requests, and with requests
             without seeds and log-probs.
    logprob  Old log-probs and training on invented responses with advantage +1 or -1, so that none is skipped. Then
             with twice the questions, and with responses twice as long.
    grade    grade_responses on arithmetic answers, right and wrong.

Each side runs in a process of its own in each turn (A B A B ...). The first step of a process is a warm-up and is not
timed.

mfu is the rate of floating-point operations in the timed steps, over the best rate of a plain matmul in compute_dtype
on this machine. That peak is measured anew before each turn. The operations of matmuls are counted in one more step,
after times and memory are taken, because counting keeps tensors alive. Recomputation counts. Fused attention on the
CPU, about 3 %, does not.

Written to results_dir: benchmark.csv (one line per figure), benchmark.png and environment.json. What is not measured
now stays as it was, unless it is from another machine.
"""

from pathlib import Path
from typing import Any

from experiments.benchmark.environment import discard_another_machines, record_environment
from experiments.benchmark.figures import read_rows, summarize, write_rows
from experiments.benchmark.random_model import QWEN, choose_model, needs_random_model
from experiments.benchmark.report import plot, table
from experiments.benchmark.settings import REPOSITORY, BenchmarkConfig, refuse_foreign_keys
from experiments.benchmark.trl_task import require_same_work
from experiments.benchmark.turns import TURNS, measure
from plainrl.cli import load_config
from plainrl.devices import run_command
from plainrl.records import UserError
from plainrl.warm_start import apply_warm_start

NEEDS_WARM_START = {"grpo", "rollout", "logprob"}


def benchmarks_to_take(name: str, config: BenchmarkConfig) -> list[str]:
    """Return the benchmark named, or of all those that make sense with this model. Say which are left out, and why.

    Raises:
        UserError: the one that is named makes none.
    """
    if name == "grpo" and needs_random_model(config):
        raise UserError(
            f"grpo: {QWEN} is not on this machine, and a random model in its place is never right, so that our "
            f"step would train on nothing; run `{run_command(f'hf download {QWEN}')}`, or use preset=laptop"
        )
    if name != "all":
        return [name]
    left_out = {}
    if config.lora_rank:
        left_out |= dict.fromkeys(("sft", "grpo"), f"TRL's side trains all weights, and lora_rank = {config.lora_rank}")
    if needs_random_model(config):
        left_out["grpo"] = "a random model is never right, so our step would train on nothing"
    for benchmark, reason in left_out.items():
        print(f"{benchmark} is left out: {reason}")
    return [benchmark for benchmark in TURNS if benchmark not in left_out]


def compare(name: str, keys: list[str]) -> None:
    """Take all turns of the benchmark named, or of all; write the results, print them."""
    refuse_foreign_keys(keys)
    config = load_config(BenchmarkConfig, REPOSITORY / "grpo_train.yaml", keys)
    names = benchmarks_to_take(name, config)
    require_same_work(config, names)
    config = choose_model(config).model_copy(update={"given": [key.partition("=")[0] for key in keys]})
    started_from = apply_warm_start(config) if NEEDS_WARM_START & set(names) else config
    warm_config = config.model_copy(update={"model": started_from.model})
    suffix = "" if config.preset == "laptop" else f"-{config.preset}"
    folder = Path(config.results_dir or f"results/benchmark{suffix}")
    folder.mkdir(parents=True, exist_ok=True)
    discard_another_machines(folder)
    trl: dict[str, Any] = {}
    for name in names:
        rows = measure(name, config if name == "sft" else warm_config, trl)
        kept = read_rows(folder / "benchmark.csv") if (folder / "benchmark.csv").exists() else []
        write_rows(folder / "benchmark.csv", [row for row in kept if row.benchmark != name] + rows)
    rows = read_rows(folder / "benchmark.csv")
    record_environment(folder / "environment.json", names, config, trl)
    plot(rows, folder / "benchmark.png")
    print("\n".join(table(summarize([row for row in rows if row.benchmark in names]))))
