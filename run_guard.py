"""What ends a run before its time: signals, and phases that hang.

SIGINT, SIGTERM, SIGHUP   the phase in progress is finished, or given up after GRACE_SECONDS; the state is saved; exit
                          status 128 + the signal's number. A second request ends the process at once
a phase over its limit    where every thread stood is written to the run's folder; exit status 124
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Self

import torch

from run_checkpoint import TrainingState
from run_config import Stopped, first_line, handle_signals, restore_handlers

GRACE_SECONDS = 20.0  # a signal's phase may go on for so long; then there is time to save within half a minute
# One request may arrive several times: from `uv run`, which hands it on, and from the process group or the terminal.
SAME_REQUEST_SECONDS = 1.0
SECONDS_TO_GIVE_UP = 30.0  # beyond a phase's limit, for a hang in native code that holds the interpreter
HUNG_STATUS = 124  # as of the command `timeout`
STDERR = os.dup(2)  # file descriptor 2 may be turned elsewhere while native code is kept quiet


class StopGuard:
    """Holds signals back until the run can be saved, and saves it however it ends; a `with` statement.

    The first signal lets the phase in progress finish: `stop_if_requested`, called between phases, then raises Stopped.
    A phase that goes on for longer than GRACE_SECONDS is given up, unless the weights are moving or being saved. On the
    way out the state is saved if it can be, also when an error ends the run; the error stays the error. A second signal
    ends the process there and then, as kill -9 would.
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
            self.stop_if_requested()  # by a signal that came after the last look

    def stop_if_requested(self) -> None:
        """Raise Stopped if a signal has come."""
        if self._requested is not None:
            raise Stopped(self._requested)

    def _save_and_say_where(self) -> None:
        message = "the weights were moving, or are no numbers: there is nothing newer than the last checkpoint to save"
        try:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # the run may be ending because there was no memory left
            if self._state.can_be_saved():
                message = f"state after step {self._state.step} saved: {self._save(self._state)}"
        except Exception as failure:  # what ends the run is the error that is on its way, not this one
            message = f"the state could not be saved: {first_line(failure)}"
        with suppress(OSError):  # a terminal that is closed
            print(f"\n{message}\nto go on: the same command with resume={self._folder}", file=sys.stderr, flush=True)

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
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS, 1.0)  # then every second: it may not be possible yet
        name = signal.Signals(signal_number).name
        with suppress(OSError):  # and no print, which this handler may have interrupted
            os.write(1, f"\n{name}: stopping after this phase; a second signal stops at once\n".encode())

    def _give_up(self, signal_number: int, frame: FrameType | None) -> None:
        can_give_up = self._state.is_whole and not self._state.is_being_saved and not self._is_over
        if self._requested is not None and can_give_up:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Stopped(self._requested)


@contextmanager
def watched(phase: str, limit_seconds: float, folder: Path, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """Time a phase, and end the process should it take longer than its limit.

    Args:
        phase: its name.
        limit_seconds: after which the stacks of all threads are written to `folder`/stacks_<phase>.txt and the process
            ends with status 124. A phase cannot be interrupted otherwise: it may hang in native code.
        folder: the run's.
        seconds: `seconds["time/<phase>"]` grows by the time that the phase took.
    """
    path = folder / f"stacks_{phase}.txt"

    def end_process() -> None:
        faulthandler.dump_traceback(file, all_threads=True)
        message = (
            f"\nerror: {phase} took longer than its limit of {limit_seconds:g} seconds; where every thread stood is in "
            f"{path}; raise the limit if it was only slow; to go on: the same command with resume={folder}\n"
        )
        file.write(message)
        file.flush()
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
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()
            path.unlink()
    if seconds is not None:
        name = f"time/{phase}"
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
