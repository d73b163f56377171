"""A temporary folder in memory that does not leak when its process is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from or1.core.terminal import tell
from or1.rollout.vllm.weight_file import free_bytes, no_room

_SHARED_MEMORY = "/dev/shm"


class MemoryFolder:
    """A private folder in /dev/shm, or on a disk if that has too little room; removed on `close` or at exit.

    The process holds a lock on the folder, which the kernel releases when the process ends. The constructor removes
    unlocked folders with the same prefix: those of killed processes. It never removes a folder in use, even by a
    container with other process ids.

    needs  bytes that the folder will hold
    spare  a folder on a disk, for want of room in /dev/shm and in the temporary folder

    Raises EngineError if no place has the room.
    """

    def __init__(self, prefix: str, needs: int = 0, spare: Path | None = None):
        parent = _place(prefix, needs, spare)
        # Under a hidden name until it is locked, so that no other process takes it for an orphan.
        made = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
        lock = os.open(made, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.path = made.rename(parent / made.name.removeprefix("."))
        self._remove = weakref.finalize(self, _remove, self.path, lock)

    def close(self) -> None:
        """Remove the folder and its contents. Idempotent."""
        self._remove()


def _place(prefix: str, needs: int, spare: Path | None) -> Path:
    """Return the first folder with room for `needs` bytes, and say so if the folder is not in memory."""
    shared = [Path(_SHARED_MEMORY)] if os.access(_SHARED_MEMORY, os.W_OK) else []
    places = [*shared, Path(tempfile.gettempdir())]
    if spare is not None:
        spare.mkdir(parents=True, exist_ok=True)
        places.append(spare)
    for parent in places:
        # First, since what a killed process left there takes the room.
        _remove_orphans(parent, prefix)
        if free_bytes(parent) >= needs:
            if shared and parent != shared[0]:
                tell(
                    f"or1: {shared[0]} has {free_bytes(shared[0]) / 2**20:,.0f} MiB and the weights take "
                    f"{needs / 2**20:,.0f}, so they go to {parent}, which is slower; in a container, docker run "
                    "--shm-size makes /dev/shm larger"
                )
            return parent
    raise no_room(max(places, key=free_bytes), needs)


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
