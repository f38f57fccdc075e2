"""What the operating system or a GPU refuses, as one line that says what to do.

Files, folders, disks and memory are the user's, so that a refusal is no bug of this project. Any other error keeps its
traceback.
"""

import errno
import os
from pathlib import Path

from plainrl.devices import is_out_of_memory
from plainrl.records import first_line

READ_ONLY = "use a folder that you may write to, or have its permissions changed"
FAULTS = {  # errno -> what to do
    errno.EACCES: READ_ONLY,
    errno.EPERM: READ_ONLY,
    errno.EROFS: READ_ONLY,
    errno.ENOSPC: "free disk space, and try again",
    errno.EDQUOT: "free disk space, and try again",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "a file stands where a folder is expected: remove or rename it",
    errno.EISDIR: "a folder stands where a file is expected: remove or rename it",
    errno.EEXIST: "a file stands where a folder is expected: remove or rename it",
    errno.ELOOP: "a link leads back to itself: remove it",
    errno.EIO: "the disk cannot be read or written: use another one",
    errno.ESTALE: "the network file system has lost it: try again",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def describe_fault(error: OSError) -> str | None:
    """Return a system's error as one line; None if it may be a bug.

    >>> describe_fault(IsADirectoryError(errno.EISDIR, "Is a directory", "runs/a/lock"))
    'runs/a/lock: Is a directory; a folder stands where a file is expected: remove or rename it'
    >>> describe_fault(FileNotFoundError(errno.ENOENT, "No such file or directory", "config.yaml")) is None
    True
    """
    advice = FAULTS.get(error.errno or 0)
    if error.errno == errno.ENOENT and error.filename is not None and os.path.islink(error.filename):
        advice = "it is a link to nothing: remove it"
    if advice is None:
        return None
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{place}{error.strerror}; {advice}"


def is_disk_full(error: Exception) -> bool:
    """Return whether an error says that the disk or its quota is full."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    texts = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    return is_full or any(text in str(error) for text in texts)  # a library may have wrapped the system's error


def describe_end(error: Exception, folder: Path, is_gone: bool) -> str | None:
    """Return why a run ended, and how it goes on; None if it may be a bug.

    Args:
        error: what ended it.
        folder: of the run.
        is_gone: whether the folder was missing by then.
    """
    again = f"go on with resume={folder}" if folder.is_dir() else "start again"
    if is_disk_full(error):
        return f"the disk of {folder} is full ({error}); free disk space, then {again}"
    if is_gone and isinstance(error, FileNotFoundError):
        return f"{folder} was removed or renamed during the run ({first_line(error)})"
    if isinstance(error, OSError) and (fault := describe_fault(error)):
        return f"{fault}; then {again}"
    if is_out_of_memory(error):
        return (
            f"out of memory on the GPU ({first_line(error)}); reduce memory by smaller microbatches (a smaller "
            "microbatch_tokens or a larger gradient_accumulation_steps), "
            "gradient_checkpointing=true, a smaller scoring_batch_size (while responses are scored), or a smaller "
            "gpu_memory_utilization (vLLM's share); a resumed run accepts them with resume_with_changes=true"
        )
    return None
