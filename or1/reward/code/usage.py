"""Memory, processes and files of a sandbox, measured from outside through /proc."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def resident_bytes(pid: int, shares: bool = False) -> int:
    """Return the resident memory in bytes of a process and all its descendants that /proc lists.

    shares  count a page that several processes share once, not once for each process
    """
    total, waiting = 0, [pid]
    while waiting:
        process = waiting.pop()
        with contextlib.suppress(OSError, ValueError, IndexError):  # it ended
            waiting += children_of(process)
            total += (_share(process) if shares else None) or _resident(process)
    return total


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _share(pid: int) -> int | None:
    """Return a process's proportional set size in bytes, or None if the kernel does not report it."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10
    return None


def children_of(pid: int) -> list[int]:
    """Return the ids of a process's children; empty if the kernel does not list them."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def scratch_files(outer: int) -> int:
    """Return the number of files in a sandbox's private folders, which bubblewrap cannot limit at the mount."""
    count = 0
    for inner in children_of(outer)[:1]:
        for folder in ("tmp", "dev/shm"):
            with contextlib.suppress(OSError):
                found = os.statvfs(f"/proc/{inner}/root/{folder}")
                count += found.f_files - found.f_ffree
    return count
