"""SFT by several ranks, without an engine: `rank_faults.py VICTIM FAULT [key=value ...]`. The fault is in step 2.

It prints when the fault begins, as `fault at SECONDS` since 1970.
"""

import errno
import itertools
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tiny import FakeEvaluator

import SFT_train
from plainrl import checkpoint, cli, distributed, guard, run_folder
from plainrl.cli import run_main
from plainrl.distributed import rank
from plainrl.records import UserError


def raise_error(error):
    raise error


def fill_disk():
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint.save_file = no_space


VICTIMS = {"first": lambda: rank() == 0, "one": lambda: rank() == 1, "all": lambda: True}
FAULTS = {
    "none": lambda: None,
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(600),
    "has a bug": lambda: raise_error(ZeroDivisionError("a bug")),
    "runs out of memory": lambda: raise_error(torch.OutOfMemoryError("CUDA out of memory")),
    "meets a user's mistake": lambda: raise_error(UserError("a mistake; mend it")),
    "fills its disk": fill_disk,
    "gets a signal": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "lets torchrun get a signal": lambda: os.kill(os.getppid(), signal.SIGTERM),
}


def main(arguments):
    who, fault, *settings = arguments
    if "=" in fault:  # a setting that the ranks do not share
        settings += [fault] * (int(os.environ["RANK"]) == 1)
        fault = "dies"
    original, steps = SFT_train.accumulate_gradients, itertools.count(1)

    def with_fault(*args, **kwargs):
        if next(steps) == 2 and VICTIMS[who]():
            os.write(2, f"\nfault at {time.time()}\n".encode())
            FAULTS[fault]()
        return original(*args, **kwargs)

    SFT_train.accumulate_gradients, SFT_train.Evaluator = with_fault, FakeEvaluator
    SFT_train.check_devices = lambda config: None  # it would ask for the CPU build of vLLM, which no rank uses
    # Ranks wait for each other. Here they wait for long only where all of them end alike.
    is_shared = who == "all" or fault == "fills its disk" or "signal" in fault
    seconds = 60.0 if is_shared else 4.0
    distributed.SECONDS_TO_COME = cli.SECONDS_FOR_FIRST_RANK = guard.SECONDS_FOR_FIRST_RANK = seconds
    # The limit of a phase is that of the step with the fault. The first step may take longer.
    watched, trained = run_folder.watched, itertools.count(1)

    def watched_from_the_second(phase, limit, *rest):
        return watched(phase, limit if phase != "train" or next(trained) > 1 else 1800, *rest)

    run_folder.watched = watched_from_the_second
    SFT_train.main(settings)


if __name__ == "__main__":
    run_main(main)
