"""The live panel of a run: a header that fits into any terminal, and a table of the latest values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from or1.core.metric_names import metric
from or1.core.text import clock, sparkline, value_text
from or1.report.console import safe
from or1.report.records import Course

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

TREND = 5  # steps averaged before and after, for a trend
_WIDE = 100  # columns from which the stage is on the line of the times
_HISTORY_FROM = 76  # columns from which there is a history column
_BAR, _LEAST_BAR, _LEAST_NAME, _GAP = 28, 4, 10, 2
_NAMES = 20  # columns of a name, so that the two bars are aligned
_LEGEND = f"over last {TREND}: against the {TREND} before; = unchanged; evaluations: since the first"

ROWS = {
    "reward/mean": 1,
    "policy/entropy": 0,
    "policy/entropy_coef": 0,
    "completion/len_mean": 0,
    "completion/truncated": -1,
    "group/kept_share": 0,
    "perf/tokens_per_s": 0,
    "optim/grad_norm": 0,
    "reward/failed": -1,
}
"""Metrics of the live table: +1 if larger values are better, -1 if smaller ones are, 0 if neither."""


class Phase(NamedTuple):
    """The current phase of a run: `done` of `total` (None if unknown), begun at `since` of a monotonic clock."""

    name: str
    done: int
    total: int | None
    since: float


@dataclass(frozen=True)
class Header:
    """The values of the header. Times are in seconds; `left_s` is None while there is no estimate."""

    step: int
    total: int
    elapsed_s: float
    left_s: float | None
    stage: str
    phase: Phase | None
    phase_s: float = 0.0


def header(shown: Header, console: Console) -> RenderableType:
    """Return the bar of the run above the bar of the current phase.

    The last line exists without a phase too, so that the height of the panel is constant.
    """
    from rich.console import Group
    from rich.text import Text

    width, phase = console.width, shown.phase
    left = "-" if shown.left_s is None else clock(shown.left_s)
    times = [Text(f"elapsed {clock(shown.elapsed_s)}"), Text(f"left {left}")]
    stage = Text(shown.stage, style="dim")
    needed = _NAMES + _BAR + sum(_GAP + len(text) for text in (*times, stage)) + _GAP
    one_line = width >= _WIDE and needed <= width
    step = Text(f"step {shown.step}/{shown.total}", style="bold")
    lines = [_line(step, "", (shown.step, shown.total), [*times, stage] if one_line and stage else times, width)]
    if stage and not one_line:
        lines.append(stage)
    if phase is None:
        return Group(*lines, Text(""))
    count = f" {phase.done}/{phase.total}" if phase.total else f" {phase.done}" if phase.done else ""
    progress = (phase.done, phase.total) if phase.total else None
    name = safe(phase.name, console)
    return Group(*lines, _line(name, count, progress, [Text(clock(shown.phase_s), style="dim")], width))


def _line(
    name: Text, count: str, progress: tuple[int, int] | None, cells: Sequence[Text], width: int
) -> RenderableType:
    """Return name, count, a bar of the remaining width, and cells on one line. A narrow terminal gets plain text."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    rest = sum(_GAP + cell.cell_len for cell in cells)
    if (room := width - rest - len(count)) < _LEAST_NAME:
        return Text("  ").join([name + count, *cells])
    if name.cell_len > room:
        name.truncate(room - 3)
        name.append("...")
    name.append(count)
    names = max(name.cell_len, _NAMES if width >= _HISTORY_FROM else 0)
    bar = min(_BAR, width - names - rest - _GAP)
    grid = Table.grid()
    grid.add_column(width=names, no_wrap=True)
    row: list[RenderableType] = [name]
    if progress is not None and bar >= _LEAST_BAR:
        done, total = progress
        grid.add_column(width=_GAP + bar)
        shown = ProgressBar(
            total=max(total, 1), completed=done, width=bar, complete_style="cyan", finished_style="green"
        )
        row.append(_padded(shown))
    elif bar >= _LEAST_BAR:
        grid.add_column(width=_GAP + bar)
        row.append(Text(""))
    for cell in cells:
        grid.add_column(width=_GAP + cell.cell_len, no_wrap=True)
        row.append(_padded(cell))
    grid.add_row(*row)
    return grid


def _padded(item: RenderableType) -> RenderableType:
    from rich.padding import Padding

    return Padding(item, (0, 0, 0, _GAP))


def values_table(history: Mapping[str, Sequence[float]], courses: Sequence[Course], console: Console) -> RenderableType:
    """Return a table with the latest value of every metric in `history` and of every course, and its change.

    history  past values by metric, one list for each of ROWS
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    ascii_only, wide = console.options.ascii_only, console.width >= _HISTORY_FROM
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("", justify="left", no_wrap=True)
    table.add_column("now", justify="right", no_wrap=True)
    table.add_column(f"over last {TREND}", justify="right", no_wrap=True)
    if wide:
        table.add_column("history", justify="left", no_wrap=True)
    for name, good in ROWS.items():
        if values := list(history[name]):
            shown = metric(name)
            trend, style = _trend(values, shown.kind, good)
            now = Text(value_text(values[-1], shown.kind), style="bold")
            line = Text(sparkline(values, 32, ascii_only), style="blue")
            table.add_row(Text(shown.label), now, Text(trend, style=style), *[line] * wide)
    for course in courses:
        style = {1: "green", 0: "dim", -1: "red"}[_sign(course.change or 0.0)]
        was = course.start if course.change is None else f"from {course.first}"
        if course.change is not None and course.steps[0] > 0:
            was += f" {course.start}"
        change = Text(course.change_text.replace("points", "pts"), style=style)
        now = Text(course.last, style="bold")
        table.add_row(safe(course.label, console), now, change, *[Text(was, style="dim")] * wide)
    return Group(table, Text(_LEGEND, style="dim")) if wide else table


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _trend(values: Sequence[float], kind: str, good: int) -> tuple[str, str]:
    """Return the mean of the last TREND values minus the mean of the TREND values before, as text, and its style."""
    span = min(TREND, len(values) // 2)
    if span == 0:
        return "", "dim"
    recent, earlier = values[-span:], values[-2 * span : -span]
    change = math.fsum(recent) / len(recent) - math.fsum(earlier) / len(earlier)
    text = value_text(abs(change), kind).replace("%", "pts")
    if text == value_text(0.0, kind).replace("%", "pts"):
        return "=", "dim"
    return ("+" if change > 0 else "-") + text, {1: "green", 0: "", -1: "red"}[good * _sign(change)]
