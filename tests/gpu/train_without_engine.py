"""Run SFT_train.py without an engine, and end it by SIGKILL where the gradient of its step KILLED_AT is computed.

The first argument is KILLED_AT, the others are those of SFT_train.py. Evaluations give zeros.
"""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[1:1] = [str(folder) for folder in Path(__file__).parents[1:3]]

from tiny import FakeEvaluator

import SFT_train

WITHOUT_ENGINE = {"check_devices": lambda config: None, "Evaluator": FakeEvaluator}  # of SFT_train.py


def main(killed_at, arguments):
    """Run until SIGKILL."""
    for name, substitute in WITHOUT_ENGINE.items():
        setattr(SFT_train, name, substitute)
    accumulate, num_steps = SFT_train.accumulate_gradients, 0

    def accumulate_or_die(*args, **kwargs):
        nonlocal num_steps
        num_steps += 1
        if num_steps == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return accumulate(*args, **kwargs)

    SFT_train.accumulate_gradients = accumulate_or_die
    SFT_train.main(arguments)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
