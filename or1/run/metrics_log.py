"""metrics.jsonl, one line per step, and the same numbers as TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from or1.core.errors import MetricsError
from or1.core.files import without_links, write_whole

_SUMS = ".metrics.sums"  # the crc32 of each line of metrics.jsonl
_ASIDE = "metrics.jsonl.damaged"
_MOST_STEPS = 10**9


class MetricsWriter:
    """Appends steps to `run_dir/metrics.jsonl`. Floats are written so that they read back bit for bit."""

    def __init__(self, run_dir: Path, tensorboard: bool, first_step: int = 0):
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.jsonl"
        self._file = self._path.open("a", encoding="utf-8")
        self._sums = (run_dir / _SUMS).open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, step: int, stage: int, metrics: dict[str, float]) -> None:
        """Append the line of one step. A number that is not finite becomes null, because JSON has no such numbers.

        Raises MetricsError if the file was removed or replaced, as by a second run: this run's lines would be lost.
        """
        self._require_own_file()
        line: dict[str, Any] = {"step": step, "stage": stage, "time": time.time()}
        line |= {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        text = json.dumps(line, allow_nan=False)
        self._file.write(text + "\n")
        self._file.flush()
        self._sums.write(_sum(text.encode()) + "\n")
        self._sums.flush()
        if self._events is not None:
            for key, value in metrics.items():
                self._events.add_scalar(key, value, step)
            self._events.flush()

    def _require_own_file(self) -> None:
        mine = os.fstat(self._file.fileno())
        try:
            there = self._path.stat()
            # Some network file systems change the inode number of an open file, so the size must differ too.
            other = not os.path.samestat(there, mine) and there.st_size != mine.st_size
            gone = mine.st_nlink == 0 or other
        except FileNotFoundError:
            gone = True
        if gone:
            raise MetricsError(
                f"{self._path} was removed or replaced while the run was at work, by a person or by another run; stop "
                "the other run, then the same command resumes from the newest checkpoint"
            )

    def close(self) -> None:
        """Flush and close all files."""
        self._file.close()
        self._sums.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl by step. Skips unreadable lines; of two lines of a step the last counts."""
    return [record for _, record in sorted(read_lines(path).records.items())]


def rewind_metrics(path: Path, step: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Drop the lines after `step`, which a resumed run writes again. Return the other records, and remarks on damage.

    Unreadable lines are moved to the file metrics.jsonl.damaged.
    """
    found = read_lines(path)
    kept = {number: line for number, line in sorted(found.lines.items()) if number <= step}
    remarks = found.remarks(path, step)
    if found.damaged:
        with open(path.with_name(_ASIDE), "ab", opener=without_links) as file:
            file.write(b"".join(line + b"\n" for line in found.damaged))
    write_whole(path, "".join(line + "\n" for line in kept.values()))
    write_whole(path.with_name(_SUMS), "".join(_sum(line.encode()) + "\n" for line in kept.values()))
    return [found.records[number] for number in kept], remarks


@dataclass
class MetricsLines:
    """Content of a metrics.jsonl: lines and records by step.

    damaged   lines that are not records, except a last line that a crash cut off
    repeated  steps with several lines
    altered   steps whose line was changed after it was written
    """

    lines: dict[int, str] = field(default_factory=dict)
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    damaged: list[bytes] = field(default_factory=list)
    repeated: set[int] = field(default_factory=set)
    altered: set[int] = field(default_factory=set)

    def remarks(self, path: Path, last: int) -> list[str]:
        """Return one line per kind of damage up to step `last`. Every step from 0 on is expected."""
        missing = [step for step in range(last + 1) if step not in self.lines]
        remarks = []
        if self.damaged:
            remarks.append(f"{path}: {len(self.damaged)} lines cannot be read; they go to {path.with_name(_ASIDE)}")
        if missing:
            remarks.append(f"{path} has no line of steps {_shown(missing)}; the report of the run lacks them")
        if repeated := sorted(step for step in self.repeated if step <= last):
            remarks.append(f"{path} has steps {_shown(repeated)} more than once; the last line of each stays")
        if altered := sorted(step for step in self.altered if step <= last):
            remarks.append(f"{path}: the lines of steps {_shown(altered)} are not as they were written; they stay")
        return remarks


def read_lines(path: Path) -> MetricsLines:
    """Read a metrics.jsonl and record its damage; never raises for damaged content."""
    found = MetricsLines()
    if not path.is_file():
        return found
    lines = path.read_bytes().split(b"\n")
    sums = path.with_name(_SUMS)
    known = set(sums.read_bytes().split()) if sums.is_file() else set()
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        if (record := _record(line)) is None:
            if i != len(lines) - 1:
                found.damaged.append(line)
            continue
        step = record["step"]
        if step in found.lines:
            found.repeated.add(step)
        found.lines[step], found.records[step] = line.decode("utf-8"), record
        # The sum of a line is written after the line. A crash between the two leaves the last line without a sum.
        if known and _sum(line).encode() not in known and any(each.strip() for each in lines[i + 1 :]):
            found.altered.add(step)
    return found


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(step := record.get("step")) is not int or not 0 <= step <= _MOST_STEPS:
        return None
    return record


def _sum(line: bytes) -> str:
    return f"{zlib.crc32(line):08x}"


def _shown(steps: list[int]) -> str:
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and ranges[-1][1] == step - 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    texts = [str(a) if a == b else f"{a} to {b}" for a, b in ranges]
    return ", ".join(texts[:10]) + (f" and {len(texts) - 10} more ranges" if len(texts) > 10 else "")
