"""Files that a crash leaves whole or absent, and that no symbolic link leads elsewhere."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a write that found no room: the disk, the user's quota, or the limit of a file's size."""
SEAL = "sha256"


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def without_links(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=without_links)`. Raises OSError if its name is a symbolic link.

    Others can guess the names of lock files and of half-written ones, and put a link to a file of the user's there.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        text = "a symbolic link, which or1 does not write through; remove it"
        raise OSError(errno.ELOOP, text, str(path)) from error


def write_whole(path: Path, text: str) -> None:
    """Replace a file; whatever happens meanwhile, its name holds the old content or the new, and the new is on disk."""
    partial = path.with_name(f".{path.name}.partial")
    # What a crash left half-written, or a link that somebody has put there.
    partial.unlink(missing_ok=True)
    with open(partial, "w", encoding="utf-8", opener=without_links) as file:
        file.write(text)
    fsync(partial)
    os.replace(partial, path)
    fsync(path.parent)


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON data with the sha256 of its canonical text under the key SEAL, for `is_unbroken`."""
    plain = json.loads(json.dumps({key: value for key, value in data.items() if key != SEAL}))
    return plain | {SEAL: _digest(plain)}


def is_unbroken(data: Mapping[str, Any]) -> bool:
    """Return whether sealed data is what was sealed. Data without a seal, of an older or1, passes."""
    return SEAL not in data or data[SEAL] == _digest({key: value for key, value in data.items() if key != SEAL})


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file, as read back from it."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}
