"""RUN/.marks.json: facts about a run that reveal lost checkpoints and changed settings.

    committed  step of the newest checkpoint ever committed, 0 before the first
    record     sha256 of the settings in config.resolved.json; two while they are being replaced

An older or1 did not write this file. In such a run, metrics.jsonl shows if there was a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from or1.core.files import is_unbroken, sealed, write_whole
from or1.run.checkpoint import step_folders
from or1.run.metrics_log import read_metrics

NAME = ".marks.json"
_ANEW = "or start anew with --fresh, which moves the run aside"


def read_marks(run_dir: Path) -> dict[str, Any]:
    """Return the marks of a run, {} if there are none or they were altered."""
    try:
        marks: dict[str, Any] = json.loads((run_dir / NAME).read_text(encoding="utf-8"))
        if is_unbroken(marks) and type(marks["committed"]) is int and isinstance(marks["record"], list):
            return marks
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    return {}


def mark_commit(run_dir: Path, step: int) -> None:
    """Record a committed checkpoint. On a full disk only the mark is lost; no error is raised."""
    with contextlib.suppress(OSError):
        write_whole(run_dir / NAME, json.dumps(sealed({"record": [], **read_marks(run_dir), "committed": step})))


def mark_record(run_dir: Path, text: str) -> None:
    """Record the hash of the settings that will replace the recorded ones. Until the next call both are valid."""
    marks = read_marks(run_dir)
    newest = marks.get("committed", max(step_folders(run_dir / "checkpoints"), default=0))
    records = [*marks.get("record", [])[-1:], _sum(text.encode())]
    # An unchanged file is not rewritten.
    if (made := {"committed": newest, "record": sorted(set(records), key=records.index)}) != {
        key: marks.get(key) for key in ("committed", "record")
    }:
        write_whole(run_dir / NAME, json.dumps(sealed(made)))


def is_altered(run_dir: Path, record: bytes) -> bool:
    """Return True if the bytes of config.resolved.json differ from those that the run wrote."""
    known = read_marks(run_dir).get("record", [])
    return bool(known) and _sum(record) not in known


def lost_history(run_dir: Path, every: int) -> str:
    """Return the reason why a run without checkpoints must not restart at step 0, "" if it may.

    every  steps between checkpoints
    """
    if step_folders(run_dir / "checkpoints"):
        return ""
    steps = max((record["step"] for record in read_metrics(run_dir / "metrics.jsonl")), default=0)
    committed = read_marks(run_dir).get("committed")
    if committed or (committed is None and steps >= every):
        done = f"had a checkpoint of step {committed}" if committed else f"did {steps} steps"
        return (
            f"{run_dir} holds a run that {done}, and {run_dir / 'checkpoints'} holds none; put that folder back, "
            f"or mount its disk, {_ANEW}"
        )
    return ""


def lost_newest(run_dir: Path) -> str:
    """Return a message if the newest checkpoint ever committed is gone, "" if it is there."""
    committed = read_marks(run_dir).get("committed", 0)
    newest = max(step_folders(run_dir / "checkpoints"), default=0)
    if committed <= newest:
        return ""
    left = f"the newest there is step_{newest}" if newest else f"none is there; put that folder back, {_ANEW}"
    return f"{run_dir / 'checkpoints'} has lost step_{committed}, the newest it had; {left}"


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
