"""Run several of the project's scripts in one process, with one engine: `run_scripts.py PLAN.json`.

The plan is a list of [module, [key=value, ...]]. Under torchrun every rank runs all of them. Starting an engine takes
longer than a tiny run. forked_scripts.py runs several plans.
"""

import functools
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import policy_evaluation
from plainrl import engine
from plainrl.cli import run_main


@functools.cache
def start_engine(model, settings):
    llm = original_init_vllm(model, **dict(settings))
    print(f"tensor_parallel_size: {llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size}")
    return llm


def init_vllm(model, **settings):
    """Start an engine as the project does, but only once for the same settings. Print how many ranks share it."""
    return start_engine(model, tuple(sorted(({"enable_sleep_mode": False} | settings).items())))


original_init_vllm = engine.init_vllm


def share_engines():
    """Let all scripts that are imported from here on share the engines."""
    policy_evaluation.init_vllm = engine.init_vllm = init_vllm


def main(arguments):
    share_engines()
    for module, settings in json.loads(Path(arguments[0]).read_text()):
        importlib.import_module(module).main(settings)


if __name__ == "__main__":
    run_main(main)
