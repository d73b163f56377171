"""What the tests of sandboxes share: one program, its score, its output, and the processes it had."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from or1.core.errors import ScorerError
from or1.core.types import Score
from or1.reward.code.grade import CodeSettings, grade_job
from or1.reward.code.sandbox import Inside, Limits, find_sandbox
from or1.reward.ground_truth import parse_ground_truth

MEMORY_MIB = 512


def kind_or_skip(choice: str) -> str:
    """Return a kind of sandbox that works here, or skip the test."""
    try:
        return find_sandbox(choice)
    except ScorerError as error:
        pytest.skip(str(error))


def score(program: str, truth: Any, sandbox: str, **changes: Any) -> Score:
    """Return the score of a program."""
    settings = CodeSettings(sandbox, 2.0, 10.0, MEMORY_MIB, 16, 4, False)
    job = {"program": program, "tests": asdict(parse_ground_truth(truth)), "settings": asdict(settings) | changes}
    return grade_job(job)


def output(program: str, sandbox: str) -> str:
    """Return the output of a program, or its last error if there is no output."""
    limits = Limits(2.0, 10.0, MEMORY_MIB << 20, 16, 4 << 20)
    with Inside(sandbox, "runner", {"program": program, "setup": ""}, limits) as runner:
        answer = runner.ask({"stdin": ""}, 2.0)
        return answer.get("stdout") or str(answer)


class Census:
    """Every descendant that was seen and was not there at the start, and the most memory that they held together."""

    def __init__(self, root: int):
        self.seen: dict[int, str] = {}
        self.peak_bytes = 0
        self._before: set[int] = set()
        self.look(root)
        self._before, self.seen, self.peak_bytes = set(self.seen), {}, 0

    def look(self, root: int) -> None:
        parents, started, pages = {}, {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            pid = int(stat.parent.name)
            parents[pid], started[pid], pages[pid] = int(fields[1]), fields[19], int(fields[21])
        found = {root}
        while more := {child for child, parent in parents.items() if parent in found} - found:
            found |= more
        found -= {root, *self._before}
        self.seen |= {pid: started[pid] for pid in found}
        self.peak_bytes = max(self.peak_bytes, sum(pages[pid] for pid in found) * 4096)

    def alive(self) -> list[int]:
        living = []
        for pid, started in self.seen.items():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[19] == started and fields[0] not in "ZX":
                living.append(pid)
        return living


@contextmanager
def census(root: int) -> Iterator[Census]:
    """Watch the descendants of `root`; afterwards all of them must be gone within a second."""
    census, stop = Census(root), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            census.look(root)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield census
    finally:
        stop.set()
        watcher.join()
    end = time.monotonic() + 1
    while census.alive() and time.monotonic() < end:
        time.sleep(0.02)
    assert census.alive() == []
