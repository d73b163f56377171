"""Weights in memory for a server on this machine do not pile up there when runs are killed."""

from __future__ import annotations

import stat
import time
from pathlib import Path

from or1.rollout.vllm.push import FilePush
from tests.helpers import fault_work
from tests.helpers.ranks import started


def when_told(path: Path) -> Path:
    deadline = time.monotonic() + 60
    while not path.is_file():
        assert time.monotonic() < deadline, "nothing was pushed"
        time.sleep(0.02)
    return Path(path.read_text())


def test_weights_of_a_killed_run_are_removed_and_those_of_a_live_run_stay(tmp_path: Path) -> None:
    with started(fault_work.hold_pushed_weights, 1, tmp_path / "living"):
        living = when_told(tmp_path / "living")
        with started(fault_work.hold_pushed_weights, 1, tmp_path / "killed"):
            killed = when_told(tmp_path / "killed")
        assert killed.is_file(), "SIGKILL leaves it there"
        push = FilePush()
        assert not killed.parent.exists() and living.read_bytes() == b"weights"
        assert stat.S_IMODE(push.path.parent.stat().st_mode) == 0o700
        push.path.write_bytes(b"weights")
        push.close()
        assert not push.path.parent.exists() and living.is_file()
    FilePush().close()
    assert not living.parent.exists()
