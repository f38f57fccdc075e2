"""A run's folder belongs to one process at a time: a name that no other run has, and a lock."""

import contextlib
import datetime
import errno
import fcntl
import itertools
import os
import platform
import time
from pathlib import Path
from typing import IO

from plainrl.records import UserError

LOCK_ATTEMPTS = 3  # several, because the table of runs holds each lock for a moment to see whether it is free
WITHOUT_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)  # some network file systems


def new_folder(runs_dir: Path, script: str) -> Path:
    """Make the folder of a run without a name, and return it: `<script>-<time>`, with a number if that is taken."""
    name = f"{script}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    runs_dir.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = runs_dir / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a folder. One that was never locked is not.

    A shared lock is tried, so that several processes may ask at the same time.

    Raises:
        OSError: the lock cannot be opened, or the file system has no locks.
    """
    if not (path / "lock").exists():
        return False
    with (path / "lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def is_known_to_be_locked(path: Path) -> bool:
    """Return the same; false where it cannot be told."""
    try:
        return is_locked(path)
    except OSError:
        return False


def lock_folder(path: Path) -> IO[str]:
    """Lock a run's folder and return the open lock file. The lock lasts until the file is closed or the process ends.

    Raises:
        UserError: another process holds the lock. The message names process and host.
    """
    try:
        file = (path / "lock").open("a+")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}: {path / 'lock'}); correct that, or copy the folder to one of "
            "your own and use the copy"
        ) from None
    for _ in range(LOCK_ATTEMPTS):
        try:
            take_lock(file, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.1)
    else:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise UserError(f"{path} is being written by {holder}; wait for it or stop it, or use another run_name")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    os.fsync(file.fileno())  # so that other nodes read it, too
    return file


def take_lock(file: IO[str], folder: Path, operation: int = fcntl.LOCK_EX) -> None:
    """Lock an open file for the folder that it stands for. A file system without locks is said, and used.

    Raises:
        BlockingIOError: the operation is not to wait, and another process holds the lock.
    """
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        print(f"warning: {folder} cannot be locked ({error.strerror}): let no other process write to it")


def holder_of(path: Path) -> str:
    """Return the process that locked a folder last, and its host; an empty text if none did, or there is no folder."""
    try:
        return (path / "lock").read_text()
    except FileNotFoundError:
        return ""
