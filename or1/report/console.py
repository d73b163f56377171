"""The console of a run, and text from outside made safe for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from or1.core.text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def default_console() -> Console:
    """The console of a run: standard output, 110 columns wide where there is no terminal to ask."""
    import sys

    from rich.console import Console

    # A process that was started with its standard output closed has none.
    return Console() if sys.stdout is not None and sys.stdout.isatty() else Console(width=110)


def safe(text: object, console: Console, style: str = "") -> Text:
    """Text from outside: no markup, no control characters, nothing the console's encoding lacks."""
    from rich.text import Text

    shown = visible(text)
    return Text(shown.encode("ascii", "replace").decode() if console.options.ascii_only else shown, style=style)


def print_pairs(pairs: Sequence[tuple[str, str]], console: Console) -> None:
    """Names and values, a pair a line; a terminal gets columns, and long values folded in theirs."""
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal:  # a log wants neither wrapped lines nor padding
        for name, value in pairs:
            console.print(safe(f"  {name:<10}  {value}", console), soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=12)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(f"  {name}", style="dim"), safe(value, console))
    console.print(table)
