"""`or1 watch`: the page of a run, written again while the run continues."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from or1.commands.arguments import positive
from or1.core.text import visible


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 watch`."""
    parser.add_argument("run_dir", type=Path, help="folder of a run, which may begin later")
    parser.add_argument("--every", type=positive, default=20, metavar="S", help="seconds between pages (default 20)")


def run(arguments: argparse.Namespace) -> int:
    """Write the page until the run has done its last step. Raises ReportError."""
    watch(arguments.run_dir, arguments.every)
    return 0


def watch(run_dir: Path, every_s: int, sleep: Callable[[float], None] = time.sleep) -> Path:
    """Write report.html again whenever the run has new metrics, and return its path after the last step.

    A browser that shows the file loads it again by itself: the page has a refresh of `every_s` seconds. Nothing
    listens on a port. After an interrupt, and after the last step, the page is written without the refresh.

    Raises ReportError if the folder cannot be reported.
    """
    from or1.report.page import write_report
    from or1.report.page_data import load_run

    metrics = run_dir / "metrics.jsonl"
    path, seen, found = run_dir / "report.html", b"", None
    print(visible(f"open {path.absolute()} in a browser; Ctrl-C ends"), flush=True)
    try:
        while True:
            # A run that has not begun has no file yet, or an empty one.
            now = _ending(metrics)
            if now and now != seen:
                path = write_report(run_dir, every_s)
                seen, found = now, load_run(run_dir)
                print(visible(f"step {found.last_step} of {found.total_steps or '?'}"), flush=True)
            # Also if nothing changed: the last checkpoint, which may end the run early, follows the last metrics.
            if found is not None and found.finished:
                break
            sleep(every_s)
    finally:
        if seen:
            write_report(run_dir)
    return path


def _ending(metrics: Path, most: int = 4096) -> bytes:
    """Return the size and the last bytes of the file; nothing before its first whole line."""
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - most))
            tail = file.read(most)
    except FileNotFoundError:
        return b""
    return b"%d " % size + tail if b"\n" in tail or size > most else b""
