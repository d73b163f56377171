"""Checkpoints on disk: safetensors shards and a JSON manifest with hashes, committed by one rename. No pickle.

    checkpoints/step_20/   manifest.json  shard_0.safetensors  shard_1.safetensors ...

`or1.run.checkpoint_writer` writes a checkpoint into a hidden sibling folder, flushes it to disk, and renames it. A
crash at any instant therefore leaves the whole step or nothing that a reader considers. Each rank writes its rows of
every tensor. The manifest records which file has which rows, so any number of ranks can read them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from or1.core.errors import CheckpointError, ForeignFileError
from or1.core.files import SEAL, file_entry, is_unbroken, remove_folder
from or1.dist.world import SINGLE, World, split_evenly

FORMAT = 2
MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(0|[1-9][0-9]*)")
_UNFINISHED = re.compile(r"\.step_[0-9]+\.(partial|removed)")
# Files that file managers and network file systems put into folders; never opened.
_LITTER = re.compile(r"\.DS_Store|\._.*|\.nfs[0-9A-Fa-f]+|Thumbs\.db|desktop\.ini")
_KEYS = frozenset({"format", "step", "world_size", "files", "tensors", "state", SEAL})
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# Exceptions of a reader whose file is not JSON, or is JSON of another shape.
_MALFORMED = (ValueError, TypeError, AttributeError, LookupError, RecursionError, OverflowError)


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after one step.

    state    plain JSON data: step, sampler, controller, counters
    tensors  masters and moments by name: this rank's rows of the tensors in `rows`; others are whole and the same on
             every rank
    rows     size of the whole tensor along dimension 0, for each tensor that is split over several ranks
    """

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    rows: dict[str, int] = field(default_factory=dict)


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of a committed step."""
    return folder / f"step_{step}"


def partial_folder(folder: Path, step: int) -> Path:
    """Return the hidden folder in which a step is written before its commit."""
    return folder / f".step_{step}.partial"


def committed_steps(folder: Path) -> list[int]:
    """Return the steps that have a committed checkpoint in `folder`, ascending."""
    if not folder.is_dir():
        return []
    found = (_STEP.fullmatch(p.name) for p in folder.iterdir() if (p / MANIFEST).is_file())
    return sorted(int(match[1]) for match in found if match)


def step_folders(folder: Path) -> list[int]:
    """Return the steps that have a folder, ascending, even a folder without a manifest, damaged after its commit."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name)))


def remove_partials(folder: Path) -> None:
    """Remove folders that a crash left half written or half removed.

    A finished folder whose commit was to replace an older one, already out of the way, is committed.
    """
    if folder.is_dir():
        found = {path.name: path for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name)}
        for name in [name for name in found if name.endswith(".partial")]:
            final = folder / name.removeprefix(".").removesuffix(".partial")
            # The manifest is written last.
            whole = (found[name] / MANIFEST).is_file() and not found[name].is_symlink()
            if whole and f".{final.name}.removed" in found and not os.path.lexists(final):
                os.replace(found.pop(name), final)
        for path in found.values():
            # rmtree refuses a symbolic link. Only the link is removed, not its target.
            path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)


def remove_step(folder: Path, step: int) -> None:
    """Remove a committed step. A crash halfway leaves nothing that a reader considers."""
    remove_folder(step_folder(folder, step))


def load_latest(
    folder: Path, world: World = SINGLE, use: Callable[[Checkpoint], None] | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """Load the newest checkpoint that verifies. Return it (None if there is none) and a warning for each newer one.

    use  called with each verified checkpoint; if it raises CheckpointError, the next older checkpoint is tried

    Collective; every rank returns the same step. Raises CheckpointError if there are checkpoints and none verifies: a
    silent fresh start would lose the run. Raises ForeignFileError for a file that is not part of a checkpoint.
    """
    warnings: list[str] = []
    # Only the main rank's listing counts: on a network file system other ranks may see an older one.
    steps = json.loads(world.gather(json.dumps(step_folders(folder)).encode())[0])
    for step in reversed(steps):
        try:
            checkpoint = load_checkpoint(step_folder(folder, step), world)
            if use is not None:
                _use(checkpoint, use, world)
            return checkpoint, warnings
        except ForeignFileError:
            raise
        except CheckpointError as error:
            warnings.append(f"{error}; falling back to the one before")
    if steps:
        raise CheckpointError("no checkpoint verifies:\n" + "\n".join(warnings) + "\nstart anew with --fresh")
    return None, warnings


def _use(checkpoint: Checkpoint, use: Callable[[Checkpoint], None], world: World) -> None:
    problem = None
    try:
        use(checkpoint)
    except CheckpointError as error:
        problem = error
    if (problem := _agree_on(problem, world)) is not None:
        raise problem


def load_checkpoint(path: Path, world: World = SINGLE) -> Checkpoint:
    """Read and verify one checkpoint, written by any number of ranks; return this rank's rows. Collective.

    Raises CheckpointError that names the missing, truncated or altered file, on every rank.
    """
    found: Checkpoint | None = None
    try:
        manifest = read_manifest(path)
        names = sorted(manifest["files"])
        problem = _first_problem(path, manifest, [names[i] for i in world.share(len(names))])
    except CheckpointError as error:
        manifest, problem = {}, error
    problem = _agree_on(problem, world)
    if problem is None:
        try:
            found = _read(path, manifest, world)
        except (*_MALFORMED, OSError, SafetensorError) as error:
            problem = CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})")
        problem = _agree_on(problem, world)
    if problem is not None or found is None:
        raise problem or CheckpointError(f"{path} cannot be read")
    return found


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Return the manifest after checking the size and sha256 of every file. Raises CheckpointError for a mismatch."""
    manifest = read_manifest(path)
    problem = _first_problem(path, manifest, sorted(manifest["files"]))
    if problem is not None:
        raise problem
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest without opening any other file.

    Raises CheckpointError for an invalid manifest, and ForeignFileError for a file that the manifest does not list.
    """
    try:
        # Checked before the manifest is opened, because the manifest itself may be a link or a pipe.
        found = _files_below(path)
        if MANIFEST not in found:
            raise CheckpointError(f"{path / MANIFEST} is missing; it was removed after the checkpoint was written")
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {manifest['format']}, this or1 reads {FORMAT}")
        files = {name: entry["sha256"] + f" {entry['bytes']:d}" for name, entry in manifest["files"].items()}
        parts = {part[0] for tensor in manifest.get("tensors", {}).values() for part in tensor["parts"]}
        problem = _mismatch(path, manifest)
    except CheckpointError:
        raise
    except (*_MALFORMED, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if problem:
        raise CheckpointError(problem)
    if foreign := sorted(found - files.keys() - {MANIFEST}):
        raise ForeignFileError(
            f"{path / foreign[0]} is not in the manifest: or1 did not write it and opens nothing in that folder; find "
            "out where it comes from, and remove it to use the checkpoint"
        )
    # Listed files lie in this folder and are verified by hash. A tensor part in any other file would not be verified.
    outside = [name for name in files if not _PLAIN.fullmatch(name)]
    if outside or (outside := sorted(map(str, parts - files.keys()))):
        raise ForeignFileError(
            f"{path / MANIFEST} takes data from {outside[0]!r}, which is no file of that checkpoint: or1 did not write "
            "this and opens nothing in that folder; restore the manifest, or remove the folder to use an older one"
        )
    return manifest


def _mismatch(path: Path, manifest: dict[str, Any]) -> str:
    """Return the reason why a manifest does not belong to this folder, "" if it does."""
    if not is_unbroken(manifest) or manifest.keys() - _KEYS:
        return f"{path / MANIFEST} does not have its own sha256; it was altered or the disk is faulty"
    step = manifest["step"]
    if (named := _STEP.fullmatch(path.name)) and (type(step) is not int or step != int(named[1])):
        return f"{path / MANIFEST} is that of step {step}; the folder was renamed or copied, give it back its own name"
    return ""


def _files_below(path: Path) -> set[str]:
    """Return the names of all files below a folder. Raises ForeignFileError for anything but files and folders."""
    found = set()
    for each in path.rglob("*"):
        mode = each.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ForeignFileError(
                f"{each} is a {'symbolic link' if stat.S_ISLNK(mode) else 'special file'}: or1 did not write it and "
                "opens nothing in that folder; remove it, or put the file itself there, to use the checkpoint"
            )
        if stat.S_ISREG(mode) and not _LITTER.fullmatch(each.name):
            found.add(each.relative_to(path).as_posix())
    return found


def _first_problem(path: Path, manifest: dict[str, Any], names: list[str]) -> CheckpointError | None:
    try:
        for name in names:
            expected, size = manifest["files"][name], (path / name).stat().st_size
            if size != expected["bytes"]:
                return CheckpointError(f"{path / name} has {size} bytes, its manifest says {expected['bytes']}")
            if file_entry(path / name) != expected:
                return CheckpointError(
                    f"{path / name} does not have the sha256 of its manifest; it was altered or the disk is faulty"
                )
    except (*_MALFORMED, OSError) as error:
        return CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})")
    return None


def _agree_on(problem: CheckpointError | None, world: World) -> CheckpointError | None:
    """Return the lowest rank's problem on every rank. Collective."""
    if world.size == 1:
        return problem
    text = "" if problem is None else f"{int(isinstance(problem, ForeignFileError))}{problem}"
    first = next((t.decode() for t in world.gather(text.encode()) if t), None)
    if first is None:
        return None
    return (ForeignFileError if first[0] == "1" else CheckpointError)(first[1:])


def _read(path: Path, manifest: dict[str, Any], world: World) -> Checkpoint:
    """Read this rank's rows of every tensor; files without such rows are not opened."""
    tensors: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    with _Shards(path) as shards:
        for name, entry in manifest["tensors"].items():
            if "rows" not in entry:
                tensors[name] = shards.whole(entry["parts"][0][0], name)
                continue
            _require_all_rows(name, entry)
            mine = split_evenly(entry["rows"], world.shard_size)[world.shard_rank]
            tensors[name] = shards.rows(name, entry["parts"], mine)
            rows[name] = entry["rows"]
    return Checkpoint(manifest["step"], manifest["state"], tensors, rows)


def _require_all_rows(name: str, entry: dict[str, Any]) -> None:
    """Raise ValueError if the parts of a tensor are not its rows one after the other."""
    end = 0
    for _, first, count in entry["parts"]:
        if first != end or count < 0:
            raise ValueError(f"the parts of {name} leave out or repeat rows at {end}")
        end += count
    if end != entry["rows"]:
        raise ValueError(f"the parts of {name} have {end} rows of {entry['rows']}")


class _Shards:
    """Open safetensors files of one checkpoint, as a context manager."""

    def __init__(self, path: Path):
        self._path = path
        self._open: dict[str, Any] = {}

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._path / name, framework="pt").__enter__()
        return self._open[name]

    def whole(self, file: str, name: str) -> Tensor:
        """Return a tensor that one file contains whole."""
        tensor: Tensor = self._file(file).get_tensor(name)
        return tensor

    def rows(self, name: str, parts: list[list[Any]], wanted: range) -> Tensor:
        """Return the rows `wanted` of a tensor that is split over files.

        parts  [file, first row, number of rows] of each part
        """
        pieces: list[Tensor] = []
        for file, first, count in parts:
            start, stop = max(wanted.start, first), min(wanted.stop, first + count)
            if start < stop:
                pieces.append(self._file(file).get_slice(name)[start - first : stop - first])
        if not pieces:
            pieces.append(self._file(parts[0][0]).get_slice(name)[0:0])
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
