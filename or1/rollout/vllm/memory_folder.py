"""A folder in memory that a process which is killed does not leave there for good."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path


class MemoryFolder:
    """A folder of this process alone, in memory where the system has that as a folder; removed on `close` or at exit.

    Its process holds a lock on it, which the kernel drops however the process ends. So the next one made with the same
    prefix removes those of dead processes, and never one in use, not even by a container with process ids of its own.
    """

    def __init__(self, prefix: str):
        parent = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
        _remove_orphans(parent, prefix)
        # Under a name that nobody looks for until it is locked.
        made = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
        lock = os.open(made, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.path = made.rename(parent / made.name.removeprefix("."))
        self._remove = weakref.finalize(self, _remove, self.path, lock)

    def close(self) -> None:
        """Remove it with all that is in it."""
        self._remove()


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _remove_orphans(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # Another user's, or gone meanwhile.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        _remove(path, lock)
