"""Atomic file and folder writes, and checksums.

Every write of or1 that a crash must not leave half done uses `replacing`, `write_whole` or `commit_folder`. They write
under a hidden temporary name and rename. A reader therefore sees the old content or the new, never a mixture.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a write without space: a full disk, an exhausted quota, or the limit on file size."""
SEAL = "sha256"


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def without_links(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=without_links)`. Raises OSError if its name is a symbolic link.

    The names of lock files and temporary files are predictable. Without this check another user could place a link
    there and make or1 overwrite the link's target.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        text = "a symbolic link, which or1 does not write through; remove it"
        raise OSError(errno.ELOOP, text, str(path)) from error


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; after the block, rename that file to `path`.

    durable  fsync the file before the rename, and the folder after. Off where speed counts more than a power cut:
             files in memory, and files that a run can write again
    shared   several processes may write `path` at once, so the temporary name contains the process id

    An error in the block leaves `path` untouched and removes the temporary file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial" if shared else f".{path.name}.partial")
    # Left by a crash, or a link that someone placed there: most writers of file formats would write through the link.
    partial.unlink(missing_ok=True)
    try:
        yield partial
        if durable:
            fsync(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


def write_whole(path: Path, text: str, *, durable: bool = True, shared: bool = False) -> None:
    """Replace the content of a file atomically; `durable` and `shared` as for `replacing`."""
    with (
        replacing(path, durable=durable, shared=shared) as partial,
        open(partial, "w", encoding="utf-8", opener=without_links) as file,
    ):
        file.write(text)


def commit_folder(partial: Path, final: Path) -> None:
    """Rename a finished folder to `final`, replace an older one there, and fsync the parent folder.

    The older one is removed last, since a removal of many gigabytes takes seconds. Between the two renames both have
    hidden names; `or1.run.checkpoint.remove_partials` finishes such a commit.

    The caller fsyncs the files. Raises NotADirectoryError if `final` is a file or a symbolic link.
    """
    hidden = None
    if os.path.lexists(final):
        if final.is_symlink() or not final.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder, so or1 does not replace it", str(final))
        hidden = final.with_name(f".{final.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(final, hidden)
    os.replace(partial, final)
    fsync(final.parent)
    if hidden is not None:
        shutil.rmtree(hidden)


def remove_folder(path: Path) -> None:
    """Remove a folder. Its name disappears first, so a crash halfway leaves no incomplete folder under that name."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON data with the sha256 of its canonical text under the key SEAL, for `is_unbroken`."""
    plain = json.loads(json.dumps({key: value for key, value in data.items() if key != SEAL}))
    return {**plain, SEAL: _digest(plain)}


def is_unbroken(data: Mapping[str, Any]) -> bool:
    """Return True if sealed data is unchanged since `sealed`, or has no seal because an older or1 wrote it."""
    return SEAL not in data or bool(data[SEAL] == _digest({key: value for key, value in data.items() if key != SEAL}))


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """Return the manifest entry of a file, {"sha256": hex digest, "bytes": size}, computed from the file on disk."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}
