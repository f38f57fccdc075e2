"""The benchmarks.

    uv run python -m experiments.benchmark sft|grpo|rollout|logprob|grade|all [key=value ...]    against TRL
    uv run --no-sync python -m experiments.benchmark gpu [key=value ...]                        what a GPU does
    uv run python -m experiments.benchmark scale [results=FILE.csv]                             what more ranks bring

`--help` lists the keys of the first line, `gpu --help` those of the second. against_trl.py, gpu.py and scale.py say
what is measured.
"""

from collections.abc import Callable
from functools import partial

from experiments.benchmark.against_trl import compare
from experiments.benchmark.gpu import measure_gpu
from experiments.benchmark.scale import measure_scale
from experiments.benchmark.turns import TURNS
from plainrl.cli import require_one_process, run_main
from plainrl.devices import run_command
from plainrl.records import UserError

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **{name: partial(compare, name) for name in (*TURNS, "all")},
    "gpu": measure_gpu,
    "scale": measure_scale,
}
USAGE = f"python -m experiments.benchmark {'|'.join(COMMANDS)} [key=value ...]"


def main(arguments: list[str]) -> None:
    """Run the benchmark named."""
    require_one_process("the benchmark")
    if arguments[:1] in (["--help"], ["-h"]):
        arguments = ["all", *arguments]
    name, *keys = arguments or [""]
    if name not in COMMANDS:
        raise UserError(f"usage: {run_command(USAGE)}; --help lists the keys, gpu --help those of gpu")
    COMMANDS[name](keys)


if __name__ == "__main__":
    run_main(main)
