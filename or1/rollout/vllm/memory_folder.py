"""A temporary folder in memory that does not leak when its process is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path


class MemoryFolder:
    """A private folder in /dev/shm, or in the temporary folder without it; removed on `close` or at exit.

    The process holds a lock on the folder, which the kernel releases when the process ends. The constructor removes
    unlocked folders with the same prefix: those of killed processes. It never removes a folder in use, even by a
    container with other process ids.
    """

    def __init__(self, prefix: str):
        parent = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
        _remove_orphans(parent, prefix)
        # Under a hidden name until it is locked, so that no other process takes it for an orphan.
        made = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
        lock = os.open(made, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.path = made.rename(parent / made.name.removeprefix("."))
        self._remove = weakref.finalize(self, _remove, self.path, lock)

    def close(self) -> None:
        """Remove the folder and its contents. Idempotent."""
        self._remove()


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _remove_orphans(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # Owned by another user, or already removed.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        _remove(path, lock)
