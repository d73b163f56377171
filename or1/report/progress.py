"""The progress of long sampling: a bar on a terminal, otherwise a line every 15 seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Self

from or1.core.text import duration, visible
from or1.report.console import default_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_LINE_EVERY_S = 15.0


class Bar:
    """A display (see `or1.core.display.Display`) that shows several named progresses.

    with Bar() as bar:
        show = bar.progress("aime24")
        show(40, 960)
    """

    def __init__(self, console: Console | None = None, unit: str = "responses"):
        self._console = console or default_console()
        self._unit = unit
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._said = 0.0
        self._last: tuple[str, int] | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.progress import TimeRemainingColumn as Left

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self._unit),
                TimeElapsedColumn(),
                TextColumn("left"),
                Left(),
            )
            self._progress = Progress(*columns, console=self._console)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def message(self, text: str) -> None:
        """Print a line that stays."""
        from rich.text import Text

        self._console.print(Text(visible(text)), soft_wrap=True)

    def progress(self, name: str) -> Callable[[int, int], None]:
        """Return a function of (done, total) that shows how far `name` is."""
        return partial(self._show, name)

    def _show(self, name: str, done: int, total: int) -> None:
        if self._progress is not None:
            from rich.markup import escape

            if name not in self._tasks:
                # Without escape, rich reads a name such as "[/b]" as markup.
                self._tasks[name] = self._progress.add_task(escape(visible(name)), total=total, completed=done)
            self._progress.update(self._tasks[name], completed=done)
            return
        now = time.monotonic()
        if name not in self._began:
            self._began[name], self._said = (now, done), now
        began, at_first = self._began[name]
        if (name, done) == self._last or (done < total and now - self._said < _LINE_EVERY_S):
            return
        self._said, self._last = now, (name, done)
        rate = (done - at_first) / (now - began) if now - began > 1 else 0.0
        left = f", left {duration((total - done) / rate)}" if rate > 0 and done < total else ""
        speed = f", {rate:.1f} a second" if rate > 0 else ""
        self.message(f"{name}: {done:,} of {total:,} {self._unit}{speed}{left}")
