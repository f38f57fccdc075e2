"""What must happen before anything large is imported, if one of this project's scripts is the program.

Importing torch and Transformers takes seconds. A wrong argument, `--help` and `--show` are therefore answered before.
Until `run_main` handles signals, Ctrl-C ends the program at once and without a traceback, as it ends a program that is
not in Python. A standard stream that the caller has closed (`>&-`) is opened again, for the next file to be opened
would take its number, and be written to.

The process of an engine, which vLLM starts for `rollouts_ahead`, imports this module, too. It ends with the run.

Of several ranks only the first prints. (Errors of each go to stderr.) On a machine each sees only its own GPU, and
calls it cuda:0. If there are twice as many GPUs as ranks, each has a second one, cuda:1. What a GPU is called has to be
settled before CUDA starts.
"""

import ctypes
import io
import os
import signal
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = ("SFT_train.py", "GRPO_train.py", "policy_evaluation.py")
PACKAGES = ("experiments", "plainrl", "supplement")
ENGINE_VARIABLE = "PLAINRL_ENGINE_PROCESS"  # set in the process of an engine: plainrl/engine_process.py
ENDS_WITH_PARENT = "PLAINRL_ENDS_WITH_PARENT"  # set in a process that must not outlive the one that started it
NUM_GPUS_VARIABLE = "PLAINRL_NUM_GPUS"  # that the ranks of this machine share
GPU_FOLDERS = Path("/proc/driver/nvidia/gpus")
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def prepare_program() -> None:
    """Prepare the process if one of this project's scripts is the program; change nothing in any other."""
    if os.environ.get(ENGINE_VARIABLE):
        prepare_engine_process()
        return
    command = own_command(getattr(sys.modules.get("__main__"), "__file__", None), sys.orig_argv)
    if not command:
        return
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a name may hold what the terminal cannot show
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        print_nothing()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # under nohup it stays ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(own_gpu(os.environ))
    # When torchrun is killed, it cannot end its ranks.
    if "TORCHELASTIC_RUN_ID" in os.environ or ENDS_WITH_PARENT in os.environ:
        end_with_parent()
    if not command.startswith("-m plainrl."):  # such a module must not be imported before it is run
        from plainrl.cli import check_arguments

        check_arguments(command, sys.argv[1:])


def prepare_engine_process() -> None:
    """Tie an engine's process to the run. Ctrl-C does not reach it, because the run decides when it stops."""
    if os.getpid() != os.getsid(0):
        os.setsid()
    end_with_parent()


def print_nothing() -> None:
    """Let what this process prints vanish, until it ends. Errors go to stderr, and are seen."""
    sys.stdout = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115


def end_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def own_gpu(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a rank sets to see only its own GPU, and a second one where there are twice as many as ranks.

    Without CUDA_VISIBLE_DEVICES it is not known yet how many there are. The second one comes last, because CUDA
    ignores a number that no GPU has, and all that follow it.

    >>> own_gpu({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,7"})
    {'CUDA_VISIBLE_DEVICES': '7', 'LOCAL_RANK': '0', 'PLAINRL_NUM_GPUS': '2'}
    >>> own_gpu({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"})["CUDA_VISIBLE_DEVICES"]
    '1,3'
    >>> own_gpu({"CUDA_VISIBLE_DEVICES": "4,7"})
    {}
    >>> own_gpu({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "4,5,6"})["CUDA_VISIBLE_DEVICES"]
    '4'
    """
    num_ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if num_ranks == 1:
        return {}
    number = int(environment["LOCAL_RANK"])
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = [*map(str, range(2 * num_ranks))] if visible is None else visible.split(",")
    num_own = 2 if len(names) >= 2 * num_ranks else 1
    of_machine = len(list(GPU_FOLDERS.glob("*"))) if visible is None else len(names)
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(names[number::num_ranks][:num_own]),
        "LOCAL_RANK": "0",
        NUM_GPUS_VARIABLE: str(of_machine or ""),
    }


def own_command(main_file: str | None, command: list[str]) -> str:
    """Return how a program of this project is started, after `python`. Of any other program it is empty.

    Args:
        main_file: the file of the module `__main__`. With `python -m` there is none while packages are imported.
        command: what Python was started with.

    >>> own_command(str(REPOSITORY / "GRPO_train.py"), ["python", "GRPO_train.py"])
    'GRPO_train.py'
    >>> own_command(None, ["python", "-mexperiments.runs", "runs"]), own_command(None, ["python", "-m", "mine"])
    ('-m experiments.runs', '')
    """
    if main_file is not None:
        path = Path(main_file).resolve()
        return path.name if path.parent == REPOSITORY.resolve() and path.name in SCRIPTS else ""
    modules = (part[2:] or after for part, after in pairwise([*command, ""]) if part.startswith("-m"))
    module = next(modules, "")
    return f"-m {module}" if module.partition(".")[0] in PACKAGES else ""
