"""The display of one rank: its phases are also what the watchdog tells the others; only the main rank shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from or1.dist.watchdog import Watchdog
from or1.report.live import RunDisplay
from or1.run.message_log import RunLog


class RankDisplay:
    """What a Trainer reports to, with the methods of RunDisplay.

    `shown` and `log` are None on all ranks but the main one; `log` also where nothing is to be written.
    """

    def __init__(self, watchdog: Watchdog, shown: RunDisplay | None, log: RunLog | None = None):
        self._watchdog, self._shown, self._log = watchdog, shown, log

    def begin(self, step: int) -> None:
        """A step begins."""
        if self._log is not None:
            self._log.step = step
        self._watchdog.beat(step=step)

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """See RunDisplay.phase."""
        self._watchdog.beat(phase=name, done=done, total=total)
        if self._shown is not None:
            self._shown.phase(name, done, total)

    def progress(self, name: str) -> Callable[[int, int], None]:
        """Return a function of (done, total) that shows the progress of a phase."""
        return partial(self.phase, name)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """See RunDisplay.step."""
        if self._shown is not None:
            self._shown.step(metrics)

    def recall(self, records: Sequence[Mapping[str, Any]]) -> None:
        """See RunDisplay.recall."""
        if self._log is not None and records:
            self._log.step = records[-1]["step"]
        if self._shown is not None:
            self._shown.recall(records)

    def message(self, text: str) -> None:
        """See RunDisplay.message; the log keeps it."""
        if self._log is not None:
            self._log.write(text)
        if self._shown is not None:
            self._shown.message(text)
