"""or1.core.files and or1.core.faults.poison: what a failure in the middle leaves, and which names are used."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from or1.core import faults
from or1.core.files import commit_folder, remove_folder, replacing, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_error_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", "old")
    with pytest.raises(OSError, match="full"), replacing(tmp_path / "a.json") as partial:
        partial.write_text("new")
        assert names(tmp_path) == [".a.json.partial", "a.json"]
        raise OSError(errno.ENOSPC, "full")
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_only_a_durable_write_is_flushed_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    write_whole(tmp_path / "a", "new", durable=False)
    assert not flushed and (tmp_path / "a").read_text() == "new"
    write_whole(tmp_path / "a", "newer")
    assert len(flushed) == 2


def test_a_shared_file_has_a_temporary_name_per_process(tmp_path: Path) -> None:
    with replacing(tmp_path / "a", shared=True) as partial:
        partial.write_text("x")
        assert names(tmp_path) == [f".a.{os.getpid()}.partial"]
    assert names(tmp_path) == ["a"]


def test_a_folder_replaces_an_older_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / text).write_text(text)
        commit_folder(tmp_path / "made", tmp_path / "final")
    assert names(tmp_path) == ["final"] and names(tmp_path / "final") == ["new"]
    remove_folder(tmp_path / "final")
    assert not names(tmp_path)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_replaces_neither_a_file_nor_a_link(tmp_path: Path, kind: str) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "mine").mkdir()
    final = tmp_path / "final"
    if kind == "file":
        final.write_text("mine")
    else:
        final.symlink_to(tmp_path / "mine")
    with pytest.raises(NotADirectoryError, match="or1 does not replace it"):
        commit_folder(tmp_path / "made", final)
    assert names(tmp_path) == ["final", "made", "mine"]


def test_poison_puts_one_infinity_into_the_first_tensor_with_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.zeros(0), torch.zeros(2, 2), torch.zeros(3)]
    faults.poison("train.gradient", tensors)
    assert all(t.isfinite().all() for t in tensors)
    monkeypatch.setattr(faults, "_FAULTS", faults._parse("train.gradient:rank0:step0+:inf"))
    faults.poison("train.gradient", tensors)
    assert [int(t.isinf().sum()) for t in tensors] == [0, 1, 0]
