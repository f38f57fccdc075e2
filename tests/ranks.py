"""Wait until a program, all its ranks and their processes have ended. kill_and_resume.py starts them."""

import contextlib
import time
from pathlib import Path

import psutil
import pytest

SECONDS_TO_END = 600  # of a start, on a machine that is busy


def is_alive(process):
    """Whether a process has not ended. One that has ended may wait for who adopted it, as a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def left_alive(processes, seconds=60):
    """Those of some processes that have not ended after a while."""
    deadline = time.monotonic() + seconds
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [process for process in processes if is_alive(process)]


def has_begun(process):
    """Whether it imports torch. plainrl/startup.py has tied it to its parent by then."""
    with contextlib.suppress(psutil.Error):
        return any("libtorch" in part.path for part in process.memory_maps())
    return False


def end(process, log, seconds=SECONDS_TO_END):
    """Wait for a process that torchrun may be, and return its status. Kill it and its own if it does not end."""
    children = {}
    deadline = time.monotonic() + seconds
    try:
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                children |= {child.pid: child for child in psutil.Process(process.pid).children(recursive=True)}
            if time.monotonic() > deadline:
                pytest.fail(f"nothing ended: {Path(log).read_text()[-3000:]}")
            time.sleep(0.05)
        assert not left_alive(children.values(), seconds=10)  # a helper of multiprocessing ends after its process
        return process.returncode
    finally:
        for hung in [process, *children.values()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                hung.kill()
