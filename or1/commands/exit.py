"""How a command reports an error: one line on standard error, and an exit code."""

from __future__ import annotations

import errno
import os

from or1.core.errors import EXIT_RETRY, EXIT_RUN
from or1.core.files import NO_ROOM
from or1.core.terminal import tell

# The user lacks the permission, or the path is of another kind than or1 needs.
_NOT_USABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
_NO_ROOM = {
    errno.EDQUOT: "the disk quota is used up ({}); make room within it",
    errno.EFBIG: "a file may not grow further ({}); raise the limit (ulimit -f)",
}


def fail(error: Exception | str, code: int) -> int:
    """Print an error on standard error and return `code`.

    Rank 0 prints the whole text, other ranks its first line: an error that all ranks raise then appears once in full.
    The watchdog reports an error of a single rank.
    """
    rank, text = os.environ.get("RANK", "0"), str(error)
    first = text.partition("\n")[0]
    tell(f"or1: {text}" if rank == "0" else f"or1: rank {rank}: {first}")
    return code


def explain_os_error(error: OSError) -> tuple[str, int] | None:
    """Return message and exit code of a file or disk problem that the user can solve.

    Return None for any other OSError: an error that names no file is not about the user's paths, so it needs a
    traceback.
    """
    if error.errno in NO_ROOM:
        remedy = _NO_ROOM.get(error.errno, "the disk is full ({}); make room")
        return remedy.format(error) + ", and the same command resumes", EXIT_RETRY
    if error.filename is None:
        return None
    if error.errno in _NOT_USABLE:
        return (
            f"{error.filename!r} cannot be used ({error.strerror}); correct that path or its rights, and "
            "repeat the command",
            EXIT_RUN,
        )
    return (
        f"{error.filename!s} cannot be used ({error}); see what it is and who may read and write it, or "
        "choose another folder",
        EXIT_RUN,
    )
