"""Run several of the project's scripts in one process, with one engine: `run_scripts.py PLAN.json`.

The plan is a list of [module, [key=value, ...]]. Under torchrun every rank runs all of them. Starting an engine takes
longer than a tiny run.
"""

import functools
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import policy_evaluation
from plainrl.cli import run_main


@functools.cache
def init_vllm(*arguments, **settings):
    """Start an engine as the project does, once, and print how many ranks share it."""
    llm = original_init_vllm(*arguments, **settings)
    print(f"tensor_parallel_size: {llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size}")
    return llm


original_init_vllm = policy_evaluation.init_vllm


def main(arguments):
    policy_evaluation.init_vllm = init_vllm
    for module, settings in json.loads(Path(arguments[0]).read_text()):
        importlib.import_module(module).main(settings)


if __name__ == "__main__":
    run_main(main)
