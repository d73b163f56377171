"""The closing tables of `or1 eval` and `or1 filter`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from or1.core.text import value_text, visible
from or1.core.types import Status
from or1.eval.accuracy import Estimate, EvalResult
from or1.report.console import default_console
from or1.reward.terms import NO_THINK_CLOSE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_BAR = 40


def print_evaluation(
    results: Sequence[EvalResult],
    sources: Mapping[str, Sequence[EvalResult]],
    lines: Sequence[str],
    console: Console | None = None,
) -> None:
    """Print accuracy of every set and its sources, pass@k, and `lines`. Graded rewards show the mean reward first.

    sources  results of each source of a set, by the name of the set; shown if a set has several sources
    """
    from rich.text import Text

    console = console or default_console()
    graded, unclosed = any(result.graded for result in results), any(result.unclosed for result in results)
    more = [NO_THINK_CLOSE] * unclosed
    table = _table(
        "set",
        "problems",
        *["reward"] * graded,
        "avg@k, %",
        "k",
        "tokens",
        "truncated",
        *more,
        "no answer",
        "timeout, crash",
    )
    for result in results:
        table.add_row(*_row(result, result.name, graded, unclosed), style="bold")
        of_set = sources.get(result.name, ())
        for each in of_set if len(of_set) > 1 else ():
            table.add_row(*_row(each, f"  {each.name}", graded, unclosed), style="dim")
    console.print()
    console.print(table)
    ks = sorted({k for result in results for k in result.pass_at})
    if ks != [1]:
        passes = _table("pass@k, %", *(f"k = {k}" for k in ks))
        for result in results:
            cells = [_percent(result.pass_at[k]) if k in result.pass_at else "" for k in ks]
            passes.add_row(Text(visible(result.name)), *cells)
        console.print()
        console.print(passes)
    console.print(Text("+- 95 % interval of the mean over problems, normal approximation", style="dim"))
    for line in lines:
        console.print(Text(visible(line)), soft_wrap=True)


def print_difficulty(
    counts: Sequence[int], keep: tuple[int, int] | None, lines: Sequence[str], console: Console | None = None
) -> None:
    """Print how many prompts were solved how often, and `lines`.

    counts  counts[c] is the number of prompts solved c times of len(counts) - 1
    keep    data.keep_difficulty; prompts outside these bounds are marked
    """
    from rich.text import Text

    console = console or default_console()
    total, most = sum(counts), max(counts)
    samples = len(counts) - 1
    low, high = keep or (1, samples - 1)
    console.print(Text(f"\nPrompts by how many of {samples} responses were right", style="bold"))
    for solved, count in enumerate(counts):
        bar = "#" * round(_BAR * count / most) if most else ""
        kept = low <= solved <= high
        line = f"  {solved:>4}  {bar:<{_BAR}}  {count:>7,}  {100 * count / total:5.1f} %"
        console.print(Text(line + ("" if kept else "   left out"), style="" if kept else "dim"), soft_wrap=True)
    stay = sum(counts[max(low, 0) : high + 1])
    console.print(
        Text(f"  keep_difficulty = [{low}, {high}] keeps {stay:,} of {total:,} prompts ({100 * stay / total:.1f} %)"),
        soft_wrap=True,
    )
    for line in lines:
        console.print(Text(visible(line)), soft_wrap=True)


def _table(first: str, *others: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=True, header_style="dim")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _row(result: EvalResult, name: str, graded: bool, unclosed: bool) -> list[str | Text]:
    from rich.text import Text

    total = result.problems * result.samples
    failed = [result.statuses.get(status.value, 0) for status in (Status.TIMEOUT, Status.CRASH)]
    none = result.statuses.get(Status.NO_ANSWER.value, 0)
    reward, no_close = [_reward(result.reward)] * graded, [f"{100 * result.unclosed:.1f} %"] * unclosed
    return [
        Text(visible(name)),
        f"{result.problems:,}",
        *reward,
        _percent(result.avg),
        str(result.samples),
        f"{result.length:,.0f}",
        f"{100 * result.truncated:.1f} %",
        *no_close,
        f"{100 * none / total:.1f} %",
        ", ".join(map(str, failed)) if any(failed) else "-",
    ]


def _reward(estimate: Estimate) -> str:
    value = value_text(estimate.value, "fixed3")
    return value if math.isnan(estimate.ci95) else f"{value} +- {value_text(estimate.ci95, 'fixed3')}"


def _percent(estimate: Estimate) -> str:
    if math.isnan(estimate.ci95):
        return f"{100 * estimate.value:.1f}"
    return f"{100 * estimate.value:.1f} +- {100 * estimate.ci95:.1f}"
