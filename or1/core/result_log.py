"""Results by key in one append-only file, so that a killed process repeats only what it had not finished."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from or1.core.errors import StoreError
from or1.core.files import is_unbroken, sealed, without_links

_SYNC_EVERY_S = 1.0


class ResultLog:
    """JSON values by key: a JSONL file whose first line has the settings under which the others were made.

    Each line has its own sha256. A power cut may damage the last lines, which are then dropped. Any thread may call.

    settings  what the values depend on besides their keys; a file made under other settings is refused

    Raises StoreError for a file of other settings, a file of another kind, or one that another process has open.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self._lock, self._values, self._synced = threading.Lock(), dict[str, Any](), 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", opener=without_links)  # noqa: SIM115 - closed by `close`
        try:
            self._take(dict(settings))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def add(self, key: str, value: Any) -> None:
        """Append one value. It survives the end of this process at once, and a power cut after a second or so.

        After `close` the value is lost: a thread may come too late, when another has failed.
        """
        with self._lock:
            if self._file.closed:
                return
            self._write({"key": key, "value": value})
            self._values[key] = value

    def close(self) -> None:
        """Flush the file to the disk and close it."""
        with self._lock, contextlib.suppress(ValueError):
            os.fsync(self._file.fileno())
            self._file.close()

    def _take(self, settings: dict[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(f"{self.path} is in use by another or1; wait for it, or write to another file") from error
        self._file.seek(0)
        whole = 0
        lines = []
        for raw in self._file:
            line = _read(raw)
            if line is None:
                break
            lines.append(line)
            whole += len(raw)
        if lines:
            self._require_equal(lines[0].get("settings"), settings)
        elif whole < os.fstat(self._file.fileno()).st_size:
            raise StoreError(f"{self.path} does not begin as a log of results; start again with --fresh, or remove it")
        # What follows a damaged line is damaged too: lines are appended in order.
        self._file.truncate(whole)
        self._values = {line["key"]: line["value"] for line in lines[1:]}
        if not lines:
            self._write({"settings": settings})

    def _require_equal(self, before: Any, settings: dict[str, Any]) -> None:
        before = before if isinstance(before, dict) else {}
        now = json.loads(json.dumps(settings))
        changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
        if changed:
            raise StoreError(
                f"{self.path} holds results made under other settings ({', '.join(changed)}); write to another file, "
                "or start again with --fresh, which moves the results aside"
            )

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(sealed(line), ensure_ascii=True).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC_EVERY_S:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


def _read(raw: bytes) -> dict[str, Any] | None:
    """Return a whole line, or None for a damaged one."""
    try:
        line = json.loads(raw) if raw.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and is_unbroken(line) and ("settings" in line or {"key", "value"} <= line.keys())
    return line if whole else None
