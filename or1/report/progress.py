"""Progress of long sampling: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from or1.core.text import duration, visible
from or1.report.console import default_console

if TYPE_CHECKING:
    from rich.console import Console

_LINE_EVERY_S = 15.0


class Bar:
    """with Bar() as bar: bar.show("aime24", 40, 960)"""

    def __init__(self, console: Console | None = None):
        self._console = console or default_console()
        self._progress = None
        self._tasks: dict[str, int] = {}
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
                TextColumn("responses"),
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
        """A line that stays."""
        from rich.text import Text

        self._console.print(Text(visible(text)), soft_wrap=True)

    def show(self, name: str, done: int, total: int) -> None:
        """`done` of `total` responses of `name` are there."""
        if self._progress is not None:
            from rich.markup import escape

            if name not in self._tasks:
                # Or rich would read a name such as "[/b]" as markup.
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
        self.message(f"{name}: {done:,} of {total:,} responses{speed}{left}")
