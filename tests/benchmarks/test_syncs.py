"""The GPU part that looks for waits inside a row: what it would report, and its rehearsal."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import syncs
from benchmarks.gpu.context import Context


def context(tmp_path: Path) -> Context:
    return Context("syncs", tmp_path, True, time.monotonic() + 60, [])


def test_the_rehearsal_trains_the_rows_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    made = context(tmp_path)
    syncs.run(made)
    assert [row["skipped"] for row in made.rows] == ["waits for the device"]


def test_waits_fail_the_part_and_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = context(tmp_path)
    monkeypatch.setattr(Context, "device", torch.device("cuda"))
    found = syncs.Counter({"a.py:1": 2, "b.py:7": 1})
    monkeypatch.setattr(syncs, "waits_of", lambda context, mode: found if mode == "layer" else syncs.Counter())
    syncs.run(made)
    assert [row["ok"] for row in made.rows] == [True, False, True, True]
    assert made.rows[1]["waits"] == 3 and made.rows[1]["places"] == {"a.py:1": 2, "b.py:7": 1}


def test_only_torchs_own_warnings_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake of torch's mode: a wait inside a row is found, one before the mode is on is not."""
    state = {"mode": "default"}
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: state.update(mode=mode))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    real = syncs._train_row

    def row(*args: object) -> object:
        warnings.warn("something else", stacklevel=1)
        if state["mode"] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return real(*args)

    monkeypatch.setattr(syncs, "_train_row", row)
    monkeypatch.setattr(syncs, "_watchable", lambda device: True)
    found = syncs.waits_of(context(tmp_path), "layer")
    assert found.total() > 0 and all("test_syncs.py" in place for place in found)
    assert state["mode"] == "default"
