"""The protocol by which long computations report to a person. The room `report` holds its implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Display(Protocol):
    """Shows messages and progress."""

    def message(self, text: str) -> None:
        """Show a line of text that stays."""
        ...

    def progress(self, name: str) -> Callable[[int, int], None]:
        """Return a function of (done, total) that shows how far the phase `name` is."""
        ...
