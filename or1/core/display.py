"""The protocol by which long computations report to a person. The room `report` holds its implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol


class Display(Protocol):
    """Shows messages and progress."""

    def message(self, text: str) -> None:
        """Show a line of text that stays."""
        ...

    def progress(self, name: str) -> Callable[[int, int], None]:
        """Return a function of (done, total) that shows how far the phase `name` is."""
        ...


class StepDisplay(Display, Protocol):
    """Shows the steps of a run too."""

    def begin(self, step: int) -> None:
        """Start step `step`."""
        ...

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show the current phase and its progress, without a bar if `total` is None."""
        ...

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step, "step" and "stage" among them."""
        ...

    def recall(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take the records of earlier steps of a resumed run."""
        ...
