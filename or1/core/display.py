"""What a run shows while it works. or1.report has the displays for a terminal and for a rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol


class Display(Protocol):
    """A place for messages, progress and the metrics of steps."""

    def begin(self, step: int) -> None:
        """Start step `step`."""

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show the current phase and its progress, without a bar if `total` is None."""

    def progress(self, name: str) -> Callable[[int, int], None]:
        """Return a function of (done, total) that shows the progress of a phase."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step, "step" and "stage" among them."""

    def recall(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take the records of earlier steps of a resumed run."""

    def message(self, text: str) -> None:
        """Show one message."""
