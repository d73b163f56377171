"""The display of one rank: every phase is a heartbeat of the watchdog, and the main rank also shows the phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from or1.dist.watchdog import Watchdog
from or1.report.live import RunDisplay
from or1.run.message_log import RunLog


class RankDisplay:
    """The display of a Trainer, with the methods of RunDisplay.

    `shown` and `log` are None on all ranks except the main rank. `log` is also None for runs that write nothing.
    """

    def __init__(self, watchdog: Watchdog, shown: RunDisplay | None, log: RunLog | None = None):
        self._watchdog, self._shown, self._log = watchdog, shown, log

    def begin(self, step: int) -> None:
        """Mark the begin of a step."""
        if self._log is not None:
            self._log.step = step
        self._watchdog.beat(step=step)

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Send a heartbeat, and show the phase as `RunDisplay.phase` does."""
        self._watchdog.beat(phase=name, done=done, total=total)
        if self._shown is not None:
            self._shown.phase(name, done, total)

    def progress(self, name: str) -> Callable[[int, int], None]:
        """Return a function of (done, total) that shows how far the phase `name` is."""
        return partial(self.phase, name)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show one record of metrics.jsonl, as `RunDisplay.step` does."""
        if self._shown is not None:
            self._shown.step(metrics)

    def recall(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the records of a resumed run, as `RunDisplay.recall` does."""
        if self._log is not None and records:
            self._log.step = records[-1]["step"]
        if self._shown is not None:
            self._shown.recall(records)

    def message(self, text: str) -> None:
        """Show a line of text that stays, and append the line to the log."""
        if self._log is not None:
            self._log.write(text)
        if self._shown is not None:
            self._shown.message(text)
