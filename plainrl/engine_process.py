"""What an engine in a process of its own needs: threads, weights by a file in memory, an end that is told.

With `rollouts_ahead` the engine samples the next rollouts while the policy trains on the present ones. vLLM then runs
in a process that it starts itself. It imports the program's main module, and with it plainrl/startup.py, which ties
its life to that of the run.

Importing this module imports neither vLLM nor wandb and starts no CUDA context.
"""

from plainrl.startup import ENGINE_VARIABLE

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from plainrl.distributed import environment_of_one_process, exchange, first_on_machine, rank
from plainrl.folder_lock import is_locked, lock_folder
from plainrl.records import UserError

if TYPE_CHECKING:
    from vllm import LLM

SHARED_MEMORY = Path("/dev/shm")
NAME = "plainrl-weights-"  # how the names of our folders there begin
SPARE_BYTES = 2**26  # of shared memory, which others use, too
ENDED = (
    "the engine's process has ended: it was killed, or its memory ran out; go on from the last state, perhaps with a "
    "lower gpu_memory_utilization or engine_cache_gib, or with rollouts_ahead = 0"
)


@contextmanager
def share_threads(device: str) -> Iterator[None]:
    """Give half of the threads to the process that is started within, and keep the other half.

    The new process is no rank of torchrun's.

    Two processes that both take all cores crawl: 8 s became 58 to 88 s on two cores.

    Args:
        device: the engine's. On a GPU no threads are given away.
    """
    given = {ENGINE_VARIABLE: "1"}
    if device == "cpu":
        num_threads = max(torch.get_num_threads() // 2, 1)
        torch.set_num_threads(num_threads)
        given["OMP_NUM_THREADS"] = str(num_threads)
    of_ranks = os.environ.keys() - environment_of_one_process().keys()
    before = {name: os.environ.get(name) for name in (*given, *of_ranks)}
    _set_variables(dict.fromkeys(of_ranks) | given)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    """Set environment variables. None removes one."""
    for name, value in values.items():
        os.environ.pop(name, None)
        os.environ.update({} if value is None else {name: value})


@contextmanager
def in_shared_memory(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Provide a folder with weights as a file: in memory if there is room, else on disk.

    A run that is killed at this moment leaves them behind. The next one removes them.

    Args:
        weights: of a whole `state_dict()`, on the CPU. None shares memory with another, which the file format refuses.
            Tied weights stand there twice, as the engine's loader wants them.
    """
    _remove_left_behind()
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    has_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > num_bytes + SPARE_BYTES
    if not has_room:
        _tell_once(f"{SHARED_MEMORY} has no room for the weights, so each copy of them goes through the disk: slowly")
    with (
        tempfile.TemporaryDirectory(prefix=NAME, dir=SHARED_MEMORY if has_room else None) as folder,
        lock_folder(Path(folder)),
    ):
        save_file(dict(weights), Path(folder) / "model.safetensors")
        yield folder


@cache
def _tell_once(text: str) -> None:
    print(text, flush=True)


def load_by_file(llm: "LLM", weights: Iterator[tuple[str, Tensor]]) -> None:
    """Hand weights to an engine in a process of its own: in a file that the first rank of each machine writes."""
    writer, copies = first_on_machine(), {}
    for name, tensor in weights:  # all ranks gather, but not all have room for a whole model
        if rank() == writer:
            copies[name] = tensor.to("cpu", copy=True)
    with in_shared_memory(copies) if rank() == writer else nullcontext("") as own:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": exchange(own)[writer]})
        exchange(None)  # the file is there until the last engine has read it


def new_processes(before: Collection[BaseProcess]) -> list[BaseProcess]:
    """Return the processes that this one has started by `multiprocessing` beside those of `before`."""
    return [process for process in multiprocessing.active_children() if process not in before]


def watch(processes: Sequence[BaseProcess]) -> None:
    """Notice when a process of the engine ends, also while this one waits for it. vLLM's client would wait for ever."""
    _watched.processes = processes
    signal.signal(signal.SIGCHLD, _look_after)


@contextmanager
def told_if_it_ended() -> Iterator[None]:
    """Raise a UserError if a process that is watched has ended, or ends within. With no such process do nothing.

    Only the main thread can be told. In another one nothing is done.

    Raises:
        UserError: the process was killed, or it failed.
    """
    if not _watched.processes or threading.current_thread() is not threading.main_thread():
        yield
        return
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        _watched.is_awaited = True
        _look_after()
        yield
    except EngineDeadError:
        raise UserError(ENDED) from None
    finally:
        _watched.is_awaited = False


def _remove_left_behind() -> None:
    """Remove folders of runs that were killed. Their locks have ended with them.

    One without weights may not be locked yet.
    """
    for place in {SHARED_MEMORY, Path(tempfile.gettempdir())}:
        for folder in place.glob(f"{NAME}*"):
            with suppress(OSError):  # gone meanwhile, or somebody else's
                has_weights = any(path.name != "lock" for path in folder.iterdir())
                if has_weights and not is_locked(folder):
                    shutil.rmtree(folder, ignore_errors=True)


def _look_after(*_: object) -> None:
    if _watched.is_awaited and wait([process.sentinel for process in _watched.processes], timeout=0):
        raise UserError(ENDED)


@dataclass
class _Watched:
    processes: Sequence[BaseProcess] = ()
    is_awaited: bool = False


_watched = _Watched()
