"""Check that this machine has the cores and the memory for the reward workers of the config."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from or1.core.errors import ScorerError

WORKERS_PER_CORE = 32
"""Largest number of workers that start in time on one core; each takes about a second of the core."""
WORKER_MIB = 96
"""Unshared memory of a worker and its child before the first job, for Python and sympy."""


def check_workers(workers: int, cores: int | None = None, free_mib: int | None = None) -> None:
    """Raise ScorerError if `workers` reward processes in each rank do not fit this machine.

    cores, free_mib  default: measured on this machine
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = _cores() if cores is None else cores
    free_mib = _free_mib() if free_mib is None else free_mib
    of = f"reward.workers = {workers}" + (f" in each of {ranks} ranks" if ranks > 1 else "")
    if workers * ranks > WORKERS_PER_CORE * cores:
        raise ScorerError(
            f"{of}: too many for {cores} cores, each of which starts {WORKERS_PER_CORE} workers in time; set "
            f"reward.workers to at most {max(WORKERS_PER_CORE * cores // ranks, 1)}"
        )
    if free_mib is not None and workers > 1 and workers * ranks * WORKER_MIB > free_mib:
        raise ScorerError(
            f"{of}: they take about {WORKER_MIB} MiB of memory each, {workers * ranks * WORKER_MIB:,} MiB, and "
            f"{free_mib:,} MiB are free; set reward.workers to at most {max(free_mib // WORKER_MIB // ranks, 1)}"
        )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_mib(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the free memory of the machine or of its container, whichever is less; None if neither can be read."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) >> 10 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached file pages count as used, but the kernel frees them when memory is needed.
        files = int(counts["active_file"]) + int(counts["inactive_file"])
        found.append(max(limit - used + files, 0) >> 20)
    return min(found, default=None)
