"""What the operating system refuses, as one line that says what to do.

Files, folders and disks are the user's, so that a refusal is no bug of this project. An error that is not in the table
keeps its traceback.
"""

import errno
import os

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
