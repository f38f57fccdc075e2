"""What stops a run early: signals, and phases that hang.

SIGINT, SIGTERM, SIGHUP   The phase in progress ends, or is given up after GRACE_SECONDS. Then the state is saved. The
                          exit status is 128 + the signal's number. A second request ends the process at once.
a phase over its limit    The stacks of all threads are written to the run's folder. The exit status is 124.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Self

import torch

from plainrl.checkpoint import TrainingState
from plainrl.cli import SECONDS_FOR_FIRST_RANK, handle_signals, of_rank, own_command, restore_handlers
from plainrl.distributed import all_are_here, largest, num_ranks, rank, speaks_for_all
from plainrl.grading.own_rewards import RewardError
from plainrl.records import Stopped, UserError, first_line

GRACE_SECONDS = 20.0  # how long a phase may go on after a signal; saving then ends within half a minute
# One request may arrive several times: `uv run` passes it on, and the terminal sends it to the whole process group.
SAME_REQUEST_SECONDS = 1.0
SECONDS_TO_GIVE_UP = 30.0  # after a phase's limit, if native code hangs and holds the interpreter
HUNG_STATUS = 124  # the status that the command `timeout` uses
STDERR = os.dup(2)  # a copy, because file descriptor 2 is redirected while native code is kept quiet


class StopGuard:
    """Delay signals until the run can be saved, and save the run however it ends. Use it in a `with` statement.

    The first signal lets the phase in progress finish. `stop_if_requested`, called between phases, then raises Stopped.
    A phase that goes on for longer than GRACE_SECONDS is given up, unless the weights are changing or being saved.
    On exit the state is saved if possible, also if an error ends the run. The error is then raised as usual.
    Several ranks agree on a stop, finish the phase whatever it takes, and save together.
    A second signal ends the process at once, as kill -9 would.
    """

    def __init__(self, state: TrainingState, save: Callable[[TrainingState], Path], folder: Path) -> None:
        self._state, self._save, self._folder = state, save, folder
        self._requested: int | None = None
        self._requested_at = 0.0
        self._is_over = False

    def __enter__(self) -> Self:
        self._previous = handle_signals(self._remember)
        self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._is_over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            if error is not None:
                self._save_and_say_where()
        finally:
            restore_handlers(self._previous)
        if error is None:
            self.stop_if_requested()  # a signal may have come after the last check

    def stop_if_requested(self) -> None:
        """Raise Stopped if a signal has arrived, at any rank."""
        if requested := int(largest(self._requested or 0)):
            raise Stopped(requested)

    def _save_and_say_where(self) -> None:
        message = (
            "the weights were changing, or are NaN or infinite: there is nothing newer than the last checkpoint to save"
        )
        try:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # the run may be ending because memory ran out
            # An error of one rank leaves the others elsewhere. One that all have may leave each in another block.
            is_agreed = num_ranks() == 1 or isinstance(sys.exception(), Stopped | UserError | RewardError)
            if not is_agreed or not all_are_here():
                message = "a rank failed: the last checkpoint is the newest state"
            elif self._state.can_be_saved():
                message = f"state after step {self._state.step} saved: {self._save(self._state)}"
        except Exception as failure:  # the run must end with the first error, not with this one
            message = f"the state could not be saved: {first_line(failure)}"
        with suppress(OSError):  # the terminal may be closed
            if rank():
                return
            print(f"\n{message}\nto go on: {own_command([f'resume={self._folder}'])}", file=sys.stderr, flush=True)

    def _remember(self, signal_number: int, frame: FrameType | None) -> None:
        if self._requested is not None:
            is_recent = time.monotonic() - self._requested_at < SAME_REQUEST_SECONDS
            if signal_number == signal.SIGHUP or (signal_number == self._requested and is_recent):
                return
            with suppress(OSError):
                os.write(STDERR, b"\nsecond signal: stopped at once; the last checkpoint is kept\n")
            os._exit(128 + signal_number)
        self._requested, self._requested_at = signal_number, time.monotonic()
        if not self._is_over:
            # After the grace period, try each second: giving up may not be possible at once.
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS, 1.0)
        name = signal.Signals(signal_number).name
        with suppress(OSError):  # not print(), which this handler may have interrupted
            if rank():
                return
            os.write(1, f"\n{name}: stopping after this phase; a second signal stops at once\n".encode())

    def _give_up(self, signal_number: int, frame: FrameType | None) -> None:
        is_alone = num_ranks() == 1  # the others would wait for what this rank gives up
        can_give_up = is_alone and self._state.is_whole and not self._state.is_being_saved and not self._is_over
        if self._requested is not None and can_give_up:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Stopped(self._requested)


@contextmanager
def watched(
    phase: str, limit_seconds: float, folder: Path, seconds: dict[str, float] | None = None, devices: Iterable[str] = ()
) -> Iterator[None]:
    """Time a phase, and end the process if the phase takes longer than its limit.

    Ending the process is the only way to interrupt a phase, because it may hang in native code.

    Args:
        phase: its name.
        limit_seconds: the limit. After it, the stacks of all threads are written to `folder`/stacks_<phase>.txt and the
            process ends with status 124.
        folder: the run's folder.
        seconds: `seconds["time/<phase>"]` grows by the time that the phase took, in seconds.
        devices: GPUs that the phase may hand work to. It ends when that is done.
    """
    path = folder / (f"stacks_{phase}_rank{rank()}.txt" if rank() else f"stacks_{phase}.txt")

    def end_process() -> None:
        faulthandler.dump_traceback(file, all_threads=True)
        message = (
            f"\n{of_rank()}error: {phase} took longer than its limit of {limit_seconds:g} seconds; the stacks of all "
            f"threads are in {path}; raise the limit if it was only slow; "
            f"to go on: {own_command([f'resume={folder}'])}\n"
        )
        file.write(message)
        file.flush()
        if speaks_for_all(SECONDS_FOR_FIRST_RANK):
            os.write(STDERR, message.encode())
        os._exit(HUNG_STATUS)

    started = time.perf_counter()
    with path.open("w") as file:
        timer = threading.Timer(limit_seconds, end_process)
        timer.daemon = True
        timer.start()
        faulthandler.dump_traceback_later(limit_seconds + SECONDS_TO_GIVE_UP, exit=True, file=file)
        try:
            yield
            for device in devices if torch.cuda.is_initialized() else ():
                torch.cuda.synchronize(device)  # without a name it would be the engine's alone
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()
            path.unlink()
    if seconds is not None:
        name = f"time/{phase}"
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
