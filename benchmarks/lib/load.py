"""Targets of benchmarks, and whether other work on the machine made a measurement of time worthless.

A target of time that is missed counts only on an idle machine. Three signs tell a busy one: the load average, a
calibration GEMM that is slower after the measurement than before, and repeats of one call that differ.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.lib.measure import seconds

MET, MISSED, NOT_JUDGED = "met", "missed", "not judged"
# The load average counts this process too, whose threads are at most as many as the CPUs.
_LOAD_BEYOND_CPUS = 0.5
# Idle machines stay below both; a second process on the same cores exceeds at least one of them.
_DRIFT, _SPREAD = 1.15, 1.2
_GEMM_WIDTH, _GEMM_REPEATS = 512, 9


@dataclass(frozen=True)
class Probe:
    """State of the machine at one moment.

    gemm_s  seconds of equal GEMMs, one after another
    load    load average of the last minute, 0 where the system has none
    """

    gemm_s: tuple[float, ...]
    load: float


@dataclass(frozen=True)
class Target:
    """A measured value with its limit, an upper one unless `at_least`. Other work can spoil the value if `timed`."""

    name: str
    value: float
    limit: float
    at_least: bool = False
    timed: bool = True

    @property
    def met(self) -> bool:
        """Return whether the value keeps the limit. A nan does not."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def verdict(self, busy: str | None, strict: bool = False) -> str:
        """Return MET, MISSED or NOT_JUDGED.

        busy    reason why a time could not be measured, from `why_busy`
        strict  a missed target is MISSED on a busy machine too
        """
        if self.met:
            return MET
        return NOT_JUDGED if self.timed and busy is not None and not strict else MISSED

    def row(self, busy: str | None, strict: bool = False) -> dict[str, object]:
        """Return the target as a row of targets.json. "busy" is None if the load decided nothing."""
        verdict = self.verdict(busy, strict)
        row = {"target": self.name, "value": self.value, "limit": self.limit, "at_least": self.at_least}
        return row | {"verdict": verdict, "busy": busy if verdict == NOT_JUDGED else None}


def probe() -> Probe:
    """Return the state of the machine now. Takes some hundredths of a second."""
    device = torch.device("cpu")
    a = torch.ones(_GEMM_WIDTH, _GEMM_WIDTH)
    out = torch.empty_like(a)
    # The first call starts threads and fills caches.
    times = [seconds(lambda: torch.mm(a, a, out=out), device) for _ in range(_GEMM_REPEATS + 1)]
    return Probe(tuple(times[1:]), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0)


def spread(times: Sequence[float]) -> float:
    """Return the median of repeats over the best: 1 if nothing disturbed them."""
    return statistics.median(times) / min(times)


def why_busy(
    before: Probe, after: Probe, repeats: Mapping[str, Sequence[float]] | None = None, cpus: int | None = None
) -> str | None:
    """Return the signs that other work disturbed what ran between two probes, or None on an idle machine.

    repeats  seconds of the rounds of each measured call, by its name
    cpus     default: those of this machine
    """
    cpus = cpus or os.cpu_count() or 1
    signs = []
    load = max(before.load, after.load)
    if load > cpus + _LOAD_BEYOND_CPUS:
        signs.append(f"load average {load:.1f} on {cpus} CPU{'s' if cpus > 1 else ''}")
    drift = min(after.gemm_s) / min(before.gemm_s)
    if not 1 / _DRIFT <= drift <= _DRIFT:
        signs.append(f"a calibration GEMM took {drift:.2f} x its former time afterwards")
    spreads = {"the calibration GEMM": max(spread(before.gemm_s), spread(after.gemm_s))}
    spreads |= {name: spread(times) for name, times in (repeats or {}).items() if len(times) > 1}
    worst = max(spreads, key=spreads.__getitem__)
    if spreads[worst] > _SPREAD:
        signs.append(f"a usual round of {worst} took {spreads[worst]:.2f} x its best")
    return ", ".join(signs) or None
