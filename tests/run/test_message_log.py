"""RUN/log.txt: what a run has said, with time and step."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest

from or1.cli import main
from or1.dist.watchdog import Watchdog
from or1.dist.world import SINGLE
from or1.report.rank_display import RankDisplay
from or1.run.message_log import RunLog, logged, read_log


def lines(folder: Path) -> list[str]:
    return (folder / "log.txt").read_text().splitlines()


def test_messages_are_appended_with_time_and_step(tmp_path: Path) -> None:
    for step in (3, 4):
        display = RankDisplay(Watchdog(SINGLE, 60.0), None, RunLog(tmp_path))
        display.begin(step)
        display.message("entropy fell\x1b[2J\nlower lr")
    assert len(lines(tmp_path)) == 4
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ step 3: entropy fell<U\+001B>\[2J", lines(tmp_path)[0])
    assert lines(tmp_path)[1] == "    lower lr" and " step 4: " in lines(tmp_path)[2]


def test_ranks_without_a_log_write_none(tmp_path: Path) -> None:
    with logged(None):
        RankDisplay(Watchdog(SINGLE, 60.0), None).message("x")
    assert not any(tmp_path.iterdir())


def test_crashes_of_rewards_and_the_end_of_a_run_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    crash = logging.getLogger("or1.reward.pool")
    with pytest.raises(ValueError, match="no more"), logged(RunLog(tmp_path)):
        crash.warning("grading %s crashed: %s", "p", "KeyError in mine.py:3")
        raise ValueError("no more")
    crash.warning("after the run")
    assert [line.partition(" start: ")[2] for line in lines(tmp_path)] == [
        "grading p crashed: KeyError in mine.py:3",
        "ended by ValueError: no more",
    ]
    # As before it is also shown, once.
    assert capsys.readouterr().err.splitlines() == ["grading p crashed: KeyError in mine.py:3", "after the run"]


def test_a_log_that_cannot_be_written_or_read_never_stops_a_run(tmp_path: Path) -> None:
    RunLog(tmp_path / "absent").write("x")
    (tmp_path / "foreign").write_text("keep")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "log.txt").symlink_to(tmp_path / "foreign")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "log.txt")
    for name in ("absent", "link", "pipe"):
        RunLog(tmp_path / name).write("x")
        assert read_log(tmp_path / name, 5) == ([], False)
    assert (tmp_path / "foreign").read_text() == "keep"


def test_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("".join(f"{n} {'x' * 400}\n" for n in range(100)))
    found, more = read_log(tmp_path, 10)
    assert [line.split()[0] for line in found] == [str(n) for n in range(90, 100)] and more
    assert read_log(tmp_path, 200)[1] is False


def test_train_says_what_it_reads_before_it_loads_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "none.toml").write_text("x = 1\n")
    assert main(["train", str(tmp_path / "none.toml")]) == 2
    assert re.fullmatch(rf"or1 [0-9.]+\S*: reading {re.escape(str(tmp_path))}/none.toml\n", capsys.readouterr().out)
    monkeypatch.setenv("RANK", "1")
    assert main(["train", str(tmp_path / "none.toml")]) == 2 and capsys.readouterr().out == ""
