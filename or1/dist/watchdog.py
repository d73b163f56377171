"""Watchdog: no rank waits forever for a rank that is gone.

Every second, a thread of each rank publishes the rank's status in torchrun's key-value store. A rank that stops
publishing, or publishes a failure, ends the run on all ranks. The message names that rank, its phase and its remaining
work. It includes the stacks of this rank's threads, which show the collective they waited in.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from or1.core.errors import EXIT_RETRY
from or1.core.pulse import pulses
from or1.core.terminal import tell, tell_traceback
from or1.dist.board import OPENING_S, STATUS_KEY
from or1.dist.world import World

_PERIOD_S = 1.0
_DIAGNOSIS_S = 6.0


class Watchdog:
    """Publishes the status of this rank and checks that of the others. With a single rank every method is a no-op."""

    def __init__(self, world: World, timeout_s: float):
        self.world, self.timeout_s = world, timeout_s
        self._period = min(_PERIOD_S, timeout_s / 5)
        self._mine: dict[str, Any] = {"step": 0, "phase": "start", "done": 0, "total": None}
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._beats = 0
        self._thread: threading.Thread | None = None
        if world.size > 1:
            # A separate connection, because that of the process group is locked while a collective is set up.
            self._store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=OPENING_S),
            )
            # On a busy machine a rank may take longer to open a connection than it may be silent later.
            self._store.set_timeout(timedelta(seconds=max(timeout_s, 5)))
            self._publish()
            world.barrier()
            self._thread = threading.Thread(target=self._watch, name="or1-watchdog", daemon=True)
            self._thread.start()

    def beat(self, **doing: Any) -> None:
        """Update this rank's status: step, phase, done, total."""
        former, self._mine = self._mine, self._mine | doing
        # A new phase is published immediately, since this rank may die in it.
        if self._thread is not None and any(former[key] != self._mine[key] for key in ("phase", "step")):
            with contextlib.suppress(RuntimeError):
                self._publish()

    def close(self) -> None:
        """Publish the normal end of this rank, so that the others stop checking it."""
        self._end("through", True)

    def fail(self, error: BaseException) -> None:
        """Publish that this rank ends with an error.

        For an error of a collective, wait first until the watch thread identifies the rank that is gone.
        """
        if self._thread is not None and is_collective_error(error):
            tell_traceback(error)
            self.timeout_s = min(self.timeout_s, 3 * self._period)
            self._thread.join(self.timeout_s + _DIAGNOSIS_S)
            self._give_up(f"a collective failed here, and {self._table()}")
        hosts_store = self._thread is not None and self.world.is_main
        self._end("failed", f"{type(error).__name__}: {error}"[:2000])
        if hosts_store:
            # The store may end with this process, so the others get time to read the reason.
            time.sleep(2 * self._period)

    def _end(self, key: str, value: Any) -> None:
        if self._thread is None:
            return
        self._stopped.set()
        self._thread.join()
        self._thread = None
        self.beat(**{key: value})
        # If the store is gone, no other rank can read the status.
        with contextlib.suppress(RuntimeError):
            self._publish()

    def _publish(self) -> None:
        with self._lock:
            self._beats += 1
            self._store.set(
                STATUS_KEY.format(self.world.rank), json.dumps(self._mine | {"beat": self._beats, "work": pulses()})
            )

    def _watch(self) -> None:
        others = [r for r in range(self.world.size) if r != self.world.rank]
        looked = time.monotonic()
        while not self._stopped.wait(self._period):
            try:
                self._publish()
                found = self._store.multi_get([STATUS_KEY.format(r) for r in others])
            except RuntimeError as error:
                self._give_up(f"the store of rank 0's node is gone ({str(error).splitlines()[0]})")
            now = time.monotonic()
            self._forgive(now - looked - self._period)
            looked = now
            for rank, text in zip(others, found, strict=True):
                status = json.loads(text)
                if rank not in self._seen or self._seen[rank][0] != status:
                    self._seen[rank] = status, now
                silent_s = now - self._seen[rank][1]
                if "failed" in status:
                    self._give_up(f"{_describe(rank, status)} failed: {status['failed']}")
                if "through" not in status and silent_s > self.timeout_s:
                    self._give_up(f"{_describe(rank, status)} has given no sign of life for {silent_s:.0f} s")

    def _forgive(self, late_s: float) -> None:
        """Extend the other ranks' deadlines by `late_s` if this thread itself ran much too late.

        A frozen container or a paused virtual machine stops all ranks while the clock runs.
        """
        if late_s > 2 * self._period:
            self._seen = {rank: (status, seen + late_s) for rank, (status, seen) in self._seen.items()}

    def _table(self) -> str:
        now = time.monotonic()
        lines = [f"{_describe(rank, s)} was last heard of {now - t:.0f} s ago" for rank, (s, t) in self._seen.items()]
        return "; ".join(lines) or "no other rank was heard of"

    def _give_up(self, reason: str) -> None:
        tell(
            f"\nor1: {reason}.\nThis is {_describe(self.world.rank, self._mine)}; it ends too, since no step can be "
            "finished without the other. The same command resumes from the newest checkpoint. Stacks of this rank:"
        )
        # 2 is the descriptor of standard error; Python's object for it may be missing.
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        # Not sys.exit: the main thread waits in a collective that never returns.
        os._exit(EXIT_RETRY)


@contextlib.contextmanager
def watched(world: World, timeout_s: float) -> Iterator[Watchdog]:
    """Run the block under a watchdog. An error that leaves the block is published to the other ranks."""
    watchdog = Watchdog(world, timeout_s)
    try:
        yield watchdog
    except BaseException as error:
        watchdog.fail(error)
        raise
    watchdog.close()


def is_collective_error(error: BaseException) -> bool:
    """Return True for the errors that collectives raise after a peer closed its connection or a wait timed out."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text or "connection" in text)
    )


def _describe(rank: int, status: dict[str, Any]) -> str:
    text = f"rank {rank} (step {status['step']}, phase {status['phase']!r}"
    if status.get("total"):
        text += f", {status['total'] - status['done']} of {status['total']} pending"
    return text + ")"
