"""Results of tunings on disk: one JSON file a machine, version and shape, in the user's cache and in run directories.

Any number of processes may read and write at once: a file is replaced whole. A file that is damaged, or is not the
result for the wanted key, is reported and ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from or1.core.files import SEAL, is_unbroken, sealed, write_whole
from or1.tune.choice import Record

RUN_FILE = "tune.json"
"""Name of the copy in a run directory."""
_MOST_BYTES = 1 << 20


def folder() -> Path:
    """Return the folder of the user's cache: $XDG_CACHE_HOME/or1/tune, by default ~/.cache/or1/tune."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "or1" / "tune"


def file_of(key: dict[str, Any]) -> Path:
    """Return the file of the results for a key."""
    text = json.dumps(key, sort_keys=True, separators=(",", ":"))
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def find(key: dict[str, Any], message: Callable[[str], None]) -> Record | None:
    """Return the cached record for a key; None if there is none. A file that cannot be used is named in a message."""
    path = file_of(key)
    record = read(path, message)
    if record is not None and record.key != key:
        message(f"{path} is the result of another machine, version or model; it is ignored and will be replaced")
        return None
    return record


def read(path: Path, message: Callable[[str], None]) -> Record | None:
    """Return the record in a file; None if there is no file, or after a message if the file is damaged."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        data = json.loads(raw)
        if not isinstance(data, dict) or SEAL not in data or not is_unbroken(data):
            raise ValueError("its checksum does not match")
        return Record.of(data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        message(f"{path} holds no usable result of or1 tune ({error}); it is ignored; remove it")
        return None


def keep(record: Record, message: Callable[[str], None]) -> Path | None:
    """Write a record to the user's cache and return its file; None, after a message, if that is not possible."""
    path = file_of(record.key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, record)
    except OSError as error:
        message(f"the result of the tuning is not kept in {path.parent} ({error}); set XDG_CACHE_HOME to a folder")
        return None
    return path


def write(path: Path, record: Record) -> None:
    """Replace a file by a record, atomically. Raises OSError."""
    write_whole(path, json.dumps(sealed(record.as_json()), indent=1) + "\n", shared=True)


def records() -> Iterator[Record]:
    """Yield all readable records of the user's cache, the newest first."""
    found = []
    for path in folder().glob("*.json"):
        try:
            found.append((path.stat().st_mtime, path))
        except OSError:
            continue
    for _, path in sorted(found, reverse=True):
        if (record := read(path, lambda text: None)) is not None:
            yield record
