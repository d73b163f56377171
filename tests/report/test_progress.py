"""The displays that long computations report to: RunDisplay, RankDisplay and Bar."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from or1.core.display import Display
from or1.report.live import RunDisplay
from or1.report.progress import Bar
from or1.report.rank_display import RankDisplay


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)


class Heart:
    """The part of a Watchdog that a display uses."""

    def __init__(self) -> None:
        self.beats: list[dict[str, Any]] = []

    def beat(self, **what: Any) -> None:
        self.beats.append(what)


def report_to(display: Display) -> None:
    display.message("a message that stays")
    show = display.progress("rollout")
    for done in (1, 2, 3):
        show(done, 3)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_shows_progress_as_its_phase(terminal: bool) -> None:
    screen = console(terminal)
    with RunDisplay(4, (), screen) as display:
        report_to(display)
    text = screen.file.getvalue()
    assert "a message that stays" in text
    assert ("rollout" in text) == terminal


def test_progress_of_a_rank_is_a_heartbeat_and_shown_by_the_main_rank_only() -> None:
    heart, screen = Heart(), console(True)
    with RunDisplay(4, (), screen) as shown:
        report_to(RankDisplay(heart, shown))
        report_to(RankDisplay(heart, None))
    assert heart.beats == [{"phase": "rollout", "done": done, "total": 3} for done in (1, 2, 3)] * 2
    assert screen.file.getvalue().count("a message that stays") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_shows_the_last_response(terminal: bool) -> None:
    screen = console(terminal)
    with Bar(screen) as bar:
        report_to(bar)
    text = screen.file.getvalue()
    assert "a message that stays" in text
    assert ("3/3" if terminal else "rollout: 3 of 3 responses") in text
