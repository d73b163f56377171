"""JSON files of measurements, with a stamp of the machine."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.measure import stamp


def write_json(path: Path, rows: Sequence[dict], **more: object) -> Path:
    """Write rows with a stamp of commit, device and versions. Return the path. The file is replaced atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(stamp() | more | {"rows": list(rows)}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path
