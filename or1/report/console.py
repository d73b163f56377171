"""The console that or1 prints on, and escaping of untrusted text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from or1.core.text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def default_console() -> Console:
    """Return a console on standard output, 110 columns wide if standard output is no terminal."""
    import sys

    from rich.console import Console

    # sys.stdout is None in a process that was started with its standard output closed.
    return Console() if sys.stdout is not None and sys.stdout.isatty() else Console(width=110)


def safe(text: object, console: Console, style: str = "") -> Text:
    """Return untrusted text without markup, control characters, and characters that the console cannot encode."""
    from rich.text import Text

    shown = visible(text)
    return Text(shown.encode("ascii", "replace").decode() if console.options.ascii_only else shown, style=style)


def print_pairs(pairs: Sequence[tuple[str, str]], console: Console) -> None:
    """Print names and values, a pair a line. On a terminal the values form a column in which long values are folded."""
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal:  # no wrapped lines and no padding in a log
        for name, value in pairs:
            console.print(safe(f"  {name:<10}  {value}", console), soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=12)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(f"  {name}", style="dim"), safe(value, console))
    console.print(table)
