"""RUN/starts.jsonl: what every start records, and files that are not as or1 wrote them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from or1 import __version__
from or1.cli import main
from or1.run.starts import NAME, commit_of, note_start, read_starts, start_record
from tests.helpers.small_run import arguments


@pytest.mark.slow
def test_every_start_of_a_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    settings = {"stage__0__steps": 1, "stage__1__steps": 1}
    for flags in ([], ["--no-tune"]):
        command = arguments(run, *flags, **settings)
        monkeypatch.setattr(sys, "argv", ["or1", *command])
        assert main(command) == 0
    first, second = read_starts(run)
    assert first["command"][:2] == ["or1", "train"] and second["command"][-1] == "--no-tune"
    assert (first["or1"], first["ranks"], first["packages"]["torch"]) == (__version__, 1, torch.__version__)
    assert 0 < first["time"] < second["time"] and first["gpus"] == [] and first["processors"] > 0
    log = (run / "log.txt").read_text()
    assert log.count(f"start: or1 {__version__} started: or1 train ") == 2


def test_a_link_and_a_folder_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / NAME).symlink_to(other)
    note_start(tmp_path, {"time": 1.0})
    assert other.read_text() == "mine" and read_starts(tmp_path) == []
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    note_start(tmp_path, {"time": 1.0})
    assert read_starts(tmp_path) == []


def test_unreadable_lines_are_left_out(tmp_path: Path) -> None:
    note_start(tmp_path, {"time": 1.0})
    with (tmp_path / NAME).open("ab") as file:
        file.write(b'{"time": 2\n\xff\n[]\n' + b"[" * 100_000 + b"\n")
    note_start(tmp_path, {"time": 3.0})
    assert [start["time"] for start in read_starts(tmp_path)] == [1.0, 3.0]


def test_a_line_that_was_cut_takes_no_other_with_it(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b'{"time": 1.0}\n{"time": 2')
    note_start(tmp_path, {"time": 3.0})
    note_start(tmp_path, {"time": 4.0})
    assert [start["time"] for start in read_starts(tmp_path)] == [1.0, 3.0, 4.0]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_of_a_checkout_tells_changed_files(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *command], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert commit_of(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "--quiet", "-m", "a")
    commit = git("rev-parse", "HEAD")[:12]
    assert commit_of(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert commit_of(tmp_path) == f"{commit}-dirty"


def test_the_record_is_json() -> None:
    assert json.loads(json.dumps(start_record(2)))["ranks"] == 2
