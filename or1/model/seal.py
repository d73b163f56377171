"""Checksums of exported weights: a JSON file in the folder lists the size and sha256 of every other file."""

from __future__ import annotations

import json
from pathlib import Path

from or1.core.files import file_entry, is_unbroken, sealed

NAME = "or1_export.json"


def seal_export(folder: Path) -> None:
    """Write the size and sha256 of every file of an exported model to its `or1_export.json`."""
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != NAME}
    (folder / NAME).write_text(json.dumps(sealed({"files": files}), indent=1) + "\n", encoding="utf-8")


def export_problem(folder: Path) -> str:
    """Return a message about the first missing or altered file, or "" if all match or no checksums exist."""
    note = folder / NAME
    if not note.exists():
        return ""
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        if not is_unbroken(noted) or not isinstance(noted["files"], dict):
            return f"{note} was altered"
        for name, entry in noted["files"].items():
            if not (folder / name).is_file():
                return f"{folder / name} is missing"
            if file_entry(folder / name) != entry:
                return f"{folder / name} was altered"
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        return f"{note} cannot be read ({type(error).__name__}: {error})"
    return ""
