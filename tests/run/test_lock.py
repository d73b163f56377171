"""The lock of a run directory where the file system has no locks, and where it is damaged."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from or1.core.errors import RunError
from or1.run.lock import RunLock


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_a_live_holder_keeps_the_folder(no_locks: None, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as holder:
        about = {"host": socket.gethostname(), "pid": holder.pid}
        (tmp_path / ".lock").write_text(json.dumps(about) + "\n")
        os.utime(tmp_path / ".lock", (time.time() + 5,) * 2)
        with pytest.raises(RunError, match=f"is at work .*{holder.pid}"):
            RunLock(tmp_path).take(make=True)
        holder.kill()
    lock = RunLock(tmp_path)
    lock.take(make=True)
    assert "has no locks (No locks available)" in lock.warnings[0] and "another machine" not in lock.warnings[0]
    lock.close()
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    lock.take(make=True)
    assert "names a process of another machine" in lock.warnings[0]


@pytest.mark.parametrize("text", ["", "\x00\x01", "[1]", "{}", '{"host": 3, "pid": "x"}'])
def test_a_damaged_lock_is_no_hindrance(text: str, no_locks: None, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(text)
    lock = RunLock(tmp_path)
    lock.take(make=True)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_process_that_took_an_old_number_is_no_holder(no_locks: None, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": other.pid}))
        os.utime(tmp_path / ".lock", (1e9, 1e9))
        RunLock(tmp_path).take(make=True)
        other.kill()
