"""metrics.jsonl, one line a step, and the same numbers as TensorBoard events."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from or1.files import write_whole


class MetricsWriter:
    """Appends to `run_dir/metrics.jsonl`; floats are written so that they read back bit for bit."""

    def __init__(self, run_dir: Path, tensorboard: bool, first_step: int = 0):
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, step: int, stage: int, metrics: dict[str, float]) -> None:
        """Write one line: a number that is not finite becomes null, which JSON can carry."""
        line: dict[str, Any] = {"step": step, "stage": stage, "time": time.time()}
        line |= {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for key, value in metrics.items():
                self._events.add_scalar(key, value, step)
            self._events.flush()

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut by a crash is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for i, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if i != len(lines) - 1:
                raise
    return records


def rewind_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines after `step`, which a resumed run writes again. Returns those that stay."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept
