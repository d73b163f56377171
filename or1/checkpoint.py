"""Checkpoints: safetensors and a JSON manifest with hashes, committed by one rename. No pickle anywhere.

    checkpoints/step_20/   manifest.json  tensors.safetensors

A checkpoint is written into a hidden sibling folder, flushed to disk, and renamed; a crash at any instant leaves either
the whole step or nothing that a reader looks at.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
_STEP = re.compile(r"step_(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """`state` is plain JSON data (step, sampler, controller, counters); `tensors` are masters and moments by name."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Commit `folder/step_N`, then remove all but the newest `keep`. Returns the committed path."""
    final = folder / f"step_{checkpoint.step}"
    partial = folder / f".step_{checkpoint.step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = partial / "tensors.safetensors"
    save_file({name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}, tensors)
    manifest = {
        "format": FORMAT,
        "step": checkpoint.step,
        "files": {tensors.name: {"sha256": _sha256(tensors), "bytes": tensors.stat().st_size}},
        "state": checkpoint.state,
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (tensors, partial / "manifest.json", partial):
        _fsync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    _fsync(folder)
    for step in committed_steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step_{step}")
    return final


def committed_steps(folder: Path) -> list[int]:
    """Steps that have a committed checkpoint in `folder`, ascending."""
    if not folder.is_dir():
        return []
    found = (_STEP.fullmatch(p.name) for p in folder.iterdir() if (p / "manifest.json").is_file())
    return sorted(int(match[1]) for match in found if match)


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, or None if there is none; with a warning for each newer one that does not.

    Raises CheckpointError if there are checkpoints and none verifies: starting anew in silence would lose the run.
    """
    remove_partials(folder)
    warnings: list[str] = []
    steps = committed_steps(folder)
    for step in reversed(steps):
        try:
            return load_checkpoint(folder / f"step_{step}"), warnings
        except CheckpointError as error:
            warnings.append(f"{error}; falling back to the one before")
    if steps:
        raise CheckpointError("no checkpoint verifies:\n" + "\n".join(warnings) + "\nstart anew with --fresh")
    return None, warnings


def remove_partials(folder: Path) -> None:
    """Remove what a crash left half-written."""
    if folder.is_dir():
        for path in folder.glob(".step_*.partial"):
            shutil.rmtree(path)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises CheckpointError naming the file that is missing, cut or altered."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {manifest['format']}, this or1 reads {FORMAT}")
        for name, expected in manifest["files"].items():
            _verify(path / name, expected)
        tensors = load_file(path / "tensors.safetensors")
        return Checkpoint(manifest["step"], manifest["state"], tensors)
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def _verify(path: Path, expected: dict[str, Any]) -> None:
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"{path} has {size} bytes, its manifest says {expected['bytes']}")
    if _sha256(path) != expected["sha256"]:
        raise CheckpointError(f"{path} does not have the sha256 of its manifest; it was altered or the disk is faulty")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
