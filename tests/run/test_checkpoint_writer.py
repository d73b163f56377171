"""Saves on full disks and saves that fail: old checkpoints stand, and each failure is one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import or1.run.checkpoint_writer as writing
from or1.cli import main
from or1.core.errors import DiskError
from or1.run.checkpoint import Checkpoint, committed_steps
from or1.run.checkpoint_writer import CheckpointWriter


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"step": step}, {"master.w": torch.zeros(4)})


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int, int], None]:
    """Simulate a disk on which a folder has room for so many shards."""
    plain = writing.save_file

    def limit(folder: Path, room: int, error: int = errno.ENOSPC) -> None:
        def save(tensors: dict[str, Any], path: Path) -> None:
            if len(list(folder.glob("*/shard_*.safetensors"))) >= room:
                raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(error)} (os error {error})")
            plain(tensors, path)

        monkeypatch.setattr(writing, "save_file", save)

    return limit


def test_a_full_disk_drops_old_checkpoints_before_it_fails(disk: Callable, tmp_path: Path) -> None:
    disk(tmp_path, 3)
    writer = CheckpointWriter(tmp_path, keep=3)
    for step in range(1, 6):
        writer.save(checkpoint(step))
        writer.wait()
    assert committed_steps(tmp_path) == [3, 4, 5], "the fourth had no room beside three others"
    disk(tmp_path, 2)
    writer.save(checkpoint(6))
    writer.wait()
    assert committed_steps(tmp_path) == [5, 6], "and a lower checkpoint.keep is not needed"


def test_the_newest_checkpoint_that_verifies_is_never_dropped(disk: Callable, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=9)
    for step in (1, 2, 3):
        writer.save(checkpoint(step))
        writer.wait()
    (tmp_path / "step_3" / "shard_0.safetensors").write_bytes(b"")
    disk(tmp_path, 2, errno.EDQUOT)
    writer.save(checkpoint(4))
    with pytest.raises(DiskError, match="the quota is used up"):
        writer.wait()
    assert committed_steps(tmp_path) == [2, 3]


@pytest.mark.parametrize(
    ("number", "told"), [(errno.EFBIG, "raise the limit"), (errno.EDQUOT, "quota"), (errno.ENOSPC, "make room")]
)
def test_a_save_without_room_says_what_is_used_up_and_that_nothing_stands(
    number: int, told: str, disk: Callable, tmp_path: Path
) -> None:
    disk(tmp_path, 0, number)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(checkpoint(1))
    with pytest.raises(DiskError, match=rf"{os.strerror(number)}.*{told}.*There is no older checkpoint"):
        writer.wait()


def test_a_failed_save_leaves_nothing_when_the_run_ends_otherwise(disk: Callable, tmp_path: Path) -> None:
    disk(tmp_path, 0)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(checkpoint(1))
    writer._job.join()
    assert list(tmp_path.iterdir())
    writer.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "told"), [(errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit -f"), (errno.ENOSPC, "the disk is full")]
)
def test_no_room_for_metrics_or_rollouts_is_one_line(
    number: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(_: object) -> int:
        raise OSError(number, os.strerror(number), "metrics.jsonl")

    monkeypatch.setattr("or1.commands.report.run", write)
    assert main(["report", "run"]) == 75
    assert told in capsys.readouterr().err


def test_a_file_that_cannot_be_used_is_one_line_and_a_bug_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = PermissionError(errno.EACCES, "Permission denied", "/some/weights")

    def read(_: object) -> int:
        raise found

    monkeypatch.setattr("or1.commands.report.run", read)
    assert main(["report", "run"]) == 70
    assert "'/some/weights'" in capsys.readouterr().err
    found = OSError("a bug")
    with pytest.raises(OSError, match="a bug"):
        main(["report", "run"])


class Racing:
    """A save that fails between two looks at it."""

    error: str | None = None

    def is_alive(self) -> bool:
        self.error = "the disk is gone"
        return False


def test_a_save_that_fails_between_two_looks_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    writer._job = Racing()
    failed: list[bool] = []
    monkeypatch.setattr(writer, "_fail", lambda: failed.append(True))
    writer.poll()
    assert failed == [True]
