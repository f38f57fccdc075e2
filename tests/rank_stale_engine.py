"""A GRPO run in which the weights of one step do not arrive in the second rank's engine. See test_distributed.py."""

import itertools

from vllm import LLM

import GRPO_train
from plainrl.distributed import rank
from plainrl.engine import SyncError


def main(settings):
    load, calls = LLM.collective_rpc, itertools.count(1)

    def load_at_first(llm, method, *arguments, kwargs):
        if rank() == 1 and next(calls) > 1:
            list(kwargs["weights_iterator"])  # it gathers the weights, in which all ranks take part
        else:
            load(llm, method, *arguments, kwargs=kwargs)

    LLM.collective_rpc = load_at_first
    try:
        GRPO_train.main(settings)
    except SyncError as error:
        print(f"rank {rank()} was told: {error}", flush=True)
    finally:
        LLM.collective_rpc = load
