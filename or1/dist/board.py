"""Counters that all ranks share, and meetings without a time limit, in torchrun's key-value store.

A collective ends the run when one rank comes later than the others by `dist.timeout_s`. But a rank with the longest
responses is not lost. So ranks meet here before the collective at the end of a rollout. Only silence ends a meeting: a
rank that has not come and whose work has not moved for `dist.timeout_s`.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

from or1.core.errors import RankSilent

STATUS_KEY = "or1/alive/{}"
"""Key of the status that the watchdog of a rank publishes."""
OPENING_S = 300.0
"""Seconds in which a rank may open a connection to the store."""
_SHORTEST_S, _LONGEST_S = 0.001, 0.25


class Store(Protocol):
    """What this module needs of torch's TCPStore."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that starts at 0; return the sum. Atomic over all ranks."""
        ...

    def set(self, key: str, value: str) -> None:
        """Set the value of a key."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Return True if every key has a value."""
        ...

    def multi_get(self, keys: list[str]) -> list[Any]:
        """Return the values of the keys, text or bytes."""
        ...


class Board:
    """Counters and meetings of the ranks of one run.

    session    text that no other run at this store has, equal on all ranks
    timeout_s  longest time without a sign of work from a rank that others wait for
    """

    def __init__(self, store: Store, rank: int, size: int, *, session: str, timeout_s: float):
        self._store, self._rank, self._size = store, rank, size
        self._prefix, self._timeout_s = f"or1/{session}", timeout_s
        self._used: Counter[str] = Counter()
        self._meetings = 0

    @classmethod
    def open(cls, rank: int, size: int, *, session: str, timeout_s: float) -> Board:
        """Connect to the store of torchrun's environment variables."""
        # A separate connection, because that of the process group is locked while a collective is set up.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=OPENING_S))
        return cls(store, rank, size, session=session, timeout_s=timeout_s)

    def counter(self, name: str) -> SharedCounter:
        """Return a new counter. The n-th of a name is the same on every rank."""
        self._used[name] += 1
        return SharedCounter(self._store, f"{self._prefix}/count/{name}/{self._used[name]}")

    def meet(self) -> None:
        """Wait until every rank has called this method, however long that takes.

        Raises RankSilent if a rank has not come, and its work has not moved for `timeout_s`. Collective.
        """
        self._meetings += 1
        here = f"{self._prefix}/meeting/{self._meetings}"
        self._store.set(self._place(self._rank), str(self._meetings))
        came = self._store.add(here, 1)
        began = time.monotonic()
        watch = _Silence(self._store, self._timeout_s, began)
        while came < self._size:
            waited = time.monotonic() - began
            time.sleep(min(max(waited / 50, _SHORTEST_S), _LONGEST_S))
            came = self._store.add(here, 0)
            if came < self._size and watch.is_due(time.monotonic()):
                watch.look(self._missing(), time.monotonic())

    def _place(self, rank: int) -> str:
        return f"{self._prefix}/at/{rank}"

    def _missing(self) -> list[int]:
        """Return the ranks that have not come to this rank's meeting."""
        ranks = [r for r in range(self._size) if r != self._rank]
        known = [r for r in ranks if self._store.check([self._place(r)])]
        came = {
            r
            for r, n in zip(known, self._values([self._place(r) for r in known]), strict=True)
            if int(n) >= self._meetings
        }
        return [r for r in ranks if r not in came]

    def _values(self, keys: Sequence[str]) -> list[Any]:
        return self._store.multi_get(list(keys)) if keys else []


class SharedCounter:
    """A counter of all ranks."""

    def __init__(self, store: Store, key: str):
        self._store, self._key = store, key

    def add(self, amount: int) -> int:
        """Add to the counter, which starts at 0; return the sum. Atomic over all ranks."""
        return self._store.add(self._key, amount)


class _Silence:
    """What the ranks that others wait for have published, and when it last changed."""

    def __init__(self, store: Store, limit_s: float, began: float):
        self._store, self._limit_s = store, limit_s
        self._seen: dict[int, tuple[Any, float]] = {}
        self._looked, self._period, self._began = began, min(5.0, limit_s / 5), began

    def is_due(self, now: float) -> bool:
        """Return True if it is time to look again."""
        return now - self._looked >= self._period

    def look(self, missing: Sequence[int], now: float) -> None:
        """Read the status of the missing ranks. Raises RankSilent for one whose work has not moved for too long."""
        # This process may have been paused itself, and the others with it.
        late = now - self._looked - self._period
        if late > 2 * self._period:
            self._began += late
            self._seen = {rank: (status, since + late) for rank, (status, since) in self._seen.items()}
        self._looked = now
        for rank in missing:
            status = self._status(rank)
            if rank not in self._seen:
                self._seen[rank] = status, self._began
            elif self._seen[rank][0] != status:
                self._seen[rank] = status, now
            if (silent := now - self._seen[rank][1]) > self._limit_s:
                raise RankSilent(
                    f"rank {rank} is expected and has shown no progress for {silent:.0f} s "
                    f"(dist.timeout_s = {self._limit_s:g}); its last status: {_described(status)}. "
                    "The same command resumes from the newest checkpoint"
                )

    def _status(self, rank: int) -> dict[str, Any] | None:
        """Return what a rank has published, without its heartbeat; None before the first status."""
        key = STATUS_KEY.format(rank)
        if not self._store.check([key]):
            return None
        status: dict[str, Any] = json.loads(self._store.multi_get([key])[0])
        status.pop("beat", None)
        return status


def _described(status: dict[str, Any] | None) -> str:
    if status is None:
        return "none"
    text = f"step {status.get('step')}, phase {status.get('phase')!r}"
    return text if not status.get("total") else f"{text}, {status['done']} of {status['total']} done"
