"""Fake candidates for the tuner: they answer in a child process without torch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from or1.tune.search import CandidateError, Values


def benches(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return a bench a group. `case` holds the behaviour of each candidate by its name."""
    return dict.fromkeys(("threads", "gemms", "head", "chunk", "attention", "mlp"), Fake(case))


def broken(case: Mapping[str, Any]) -> dict[str, Any]:
    raise ImportError("no bench here")


class Fake:
    """A bench whose candidates behave as their options say."""

    def __init__(self, case: Mapping[str, Any]):
        self.case = case

    def prepare(self) -> None:
        pass

    def check(self, options: Mapping[str, Any]) -> float:
        return behave(self.case.get("behaviour", {}).get(str(next(iter(options.values()), "default")), 0.5))

    def seconds(self, options: Mapping[str, Any]) -> float:
        # More rows a chunk are faster here, so that the choice is known.
        return 0.1 / options.get("head_chunk_rows", 1) / (2 if options.get("head_impl") == "native" else 1)


def behave(how: Any) -> float:
    if how == "raise":
        raise RuntimeError("no kernel for this shape\nand a second line")
    if how == "memory":
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
    if how == "device":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if how == "hang":
        time.sleep(60)
    if how == "die":
        print("a last word")
        os.kill(os.getpid(), signal.SIGSEGV)
    return float(how)


class Clock:
    """A clock that moves only when a candidate runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Scripted:
    """A runner in this process. times: seconds of the runs of each candidate, in order, repeated."""

    def __init__(self, clock: Clock, times: Mapping[str, list[float]], errors: Mapping[str, float | str]):
        self.clock, self.times, self.errors = clock, times, errors
        self.runs: list[str] = []

    def prepare(self, group: str, limit_s: float) -> None:
        self.clock.now += 0.01

    def check(self, group: str, options: Values, limit_s: float) -> float:
        name = str(options["head_impl"])
        self.clock.now += self.times[name][0]
        error = self.errors.get(name, 0.5)
        if isinstance(error, str):
            raise CandidateError(error)
        return error

    def seconds(self, group: str, options: Values, limit_s: float) -> float:
        name = str(options["head_impl"])
        took = self.times[name][self.runs.count(name) % len(self.times[name])]
        self.runs.append(name)
        if took > limit_s:
            self.clock.now += limit_s
            raise CandidateError(f"no answer within {limit_s:.3g} s")
        self.clock.now += took
        return took
