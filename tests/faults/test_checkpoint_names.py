"""A manifest or a folder that somebody has changed leads to no file outside its checkpoint, and to no traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from or1.cli import main
from or1.core.errors import CheckpointError, ForeignFileError
from or1.core.files import sealed
from or1.run.checkpoint import Checkpoint, load_checkpoint, load_latest, remove_partials, verify_checkpoint
from or1.run.checkpoint_writer import save_checkpoint

SHARD = "shard_0.safetensors"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Write a run with two checkpoints, and a file of tensors with the names of the second."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        save_checkpoint(folder, Checkpoint(step, {}, {"master.w": torch.full((4, 2), float(step))}), keep=3)
    save_file({"master.w": torch.zeros(4, 2)}, tmp_path / "outside.safetensors")
    return tmp_path / "run"


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    # Sealed again, as somebody who means it would.
    (path / "manifest.json").write_text(json.dumps(sealed(manifest)))


def assert_refused(run_dir: Path, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / "checkpoints" / "step_2"
    for reading in (load_checkpoint, verify_checkpoint):
        with pytest.raises(ForeignFileError, match=named):
            reading(path)
    with pytest.raises(ForeignFileError, match=named):
        load_latest(run_dir / "checkpoints")
    assert main(["ckpt", "verify", str(run_dir)]) == 2
    assert named in capsys.readouterr().err
    assert main(["ckpt", "ls", str(run_dir)]) == 0


@pytest.mark.parametrize("name", ["../../../outside.safetensors", "{}/outside.safetensors", "sub/x.safetensors", ".."])
@pytest.mark.parametrize("where", ["part", "file", "both"])
def test_a_part_comes_from_the_files_of_the_checkpoint_only(
    name: str, where: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = name.format(run_dir.parent)

    def change(manifest: dict[str, Any]) -> None:
        if where != "file":
            manifest["tensors"]["master.w"]["parts"][0][0] = name
        if where != "part":
            manifest["files"][name] = manifest["files"][SHARD]

    edit(run_dir / "checkpoints" / "step_2", change)
    assert_refused(run_dir, name, capsys)


@pytest.mark.parametrize("kind", ["shard", "manifest", "folder", "foreign file", "pipe", "dangling"])
def test_a_link_in_a_checkpoint_is_not_followed(
    kind: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "checkpoints" / "step_2"
    name = {"shard": SHARD, "manifest": "manifest.json"}.get(kind, "odd")
    if (path / name).exists():
        (path / name).rename(tmp_path / name)
    if kind == "pipe":
        # Who opens it waits for ever.
        os.mkfifo(path / name)
    else:
        target = {"folder": tmp_path, "foreign file": tmp_path / "outside.safetensors"}.get(kind, tmp_path / name)
        (path / name).symlink_to(target)
    assert_refused(run_dir, f"step_2/{name} is a", capsys)


BROKEN = {
    "deep": "[" * 100_000,
    "digits": '{"format": ' + "9" * 5000 + "}",
    "list": "[]",
    "number": "1",
    "text": "{",
    "files": '{"format": 2, "files": [1]}',
    "entry": '{"format": 2, "files": {"a": 1}}',
    "size": '{"format": 2, "files": {"a": {"sha256": "", "bytes": "many"}}}',
    "tensors": '{"format": 2, "files": {}, "tensors": []}',
    "parts": '{"format": 2, "files": {}, "tensors": {"w": {"parts": [[]]}}}',
    "part": '{"format": 2, "files": {}, "tensors": {"w": {"parts": [[["w"]]]}}}',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_manifest_of_another_shape_falls_back_to_the_checkpoint_before(
    kind: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir / "checkpoints"
    (folder / "step_2" / SHARD).unlink()
    (folder / "step_2" / "manifest.json").write_text(BROKEN[kind])
    with pytest.raises(CheckpointError, match="step_2"):
        load_checkpoint(folder / "step_2")
    latest, warnings = load_latest(folder)
    assert latest is not None and latest.step == 1 and len(warnings) == 1
    assert main(["ckpt", "verify", str(run_dir)]) == 70
    assert main(["ckpt", "ls", str(run_dir)]) == 0
    assert "step_2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["tensors"]["master.w"].update(rows="many"),
        lambda m: m["tensors"]["master.w"].update(parts=[]),
        lambda m: m["tensors"]["master.w"].update(rows=4, parts=[[SHARD]]),
        lambda m: m.pop("state"),
        lambda m: m["tensors"]["master.w"].update(rows=4, parts=[[SHARD, 0, "all"]]),
    ],
)
def test_a_manifest_whose_parts_make_no_sense_is_one_line(change: Callable[[dict], None], run_dir: Path) -> None:
    edit(run_dir / "checkpoints" / "step_2", change)
    latest, warnings = load_latest(run_dir / "checkpoints")
    assert latest is not None and latest.step == 1 and "step_2 cannot be read" in warnings[0]


def test_what_a_crash_left_is_removed_and_never_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    folder = tmp_path / "checkpoints"
    (folder / ".step_1.partial").mkdir(parents=True)
    (folder / ".step_2.partial").symlink_to(tmp_path / "mine")
    remove_partials(folder)
    assert list(folder.iterdir()) == [] and (tmp_path / "mine" / "thesis.tex").is_file()
