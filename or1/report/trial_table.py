"""The tables of `or1 reward`: graded texts of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from or1.core.text import value_text
from or1.core.types import Prompt
from or1.report.console import default_console, safe
from or1.reward.terms import RIGHT, status_word

if TYPE_CHECKING:
    from rich.console import Console

    from or1.reward.trial import Trial

_MOST = 300
"""Characters of a text that are shown."""


def print_trials(prompt: Prompt, trials: Sequence[Trial], console: Console | None = None) -> None:
    """Print a row, its reference answers, and every graded text with reward, status, answer, reason and seconds."""
    from rich.text import Text

    console = console or default_console()
    console.print(Text("\n") + safe(prompt.id, console, "bold"), soft_wrap=True)
    golds = ", ".join(prompt.golds) or ("tests" if prompt.tests is not None else "none")
    for name, value in (("prompt", shortened(prompt.text)), ("reference", golds)):
        console.print(Text(f"  {name:<10} ", style="dim") + safe(value, console), soft_wrap=True)
    for trial in trials:
        score, style = trial.score, "green" if trial.score.reward >= RIGHT else ""
        head = Text(f"  {trial.sample.what}: ") + safe(value_text(score.reward, "fixed3"), console, f"bold {style}")
        head.append_text(safe(f"  {status_word(score.status, 'stop')}, {trial.seconds:.3f} s", console))
        console.print(head, soft_wrap=True)
        found = trial.answer if trial.answer != trial.sample.text.strip() else ""
        for name, value in (("text", trial.sample.text), ("extracted", found), ("reason", trial.reason)):
            if value:
                shown = safe(shortened(value), console)
                console.print(Text(f"    {name:<10} ", style="dim") + shown, soft_wrap=True)


def shortened(text: str, most: int = _MOST) -> str:
    """Return a text on one line, without its middle if the text is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"
