"""RUN/log.txt: the messages of a run in order, with time and step. A resumed run appends."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from or1.core.text import visible

NAME = "log.txt"
# Without these flags, a link in place of the file would redirect the writes, and a pipe would block the run.
_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class RunLog:
    """Log of a run. `step` is the current step, None before the first step after a start.

    If the disk is full or the log cannot be opened, the line is lost and the run continues; the terminal showed it too.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / NAME
        self.step: int | None = None

    def write(self, text: str) -> None:
        """Append one message; lines after its first are indented."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        where = "start" if self.step is None else f"step {self.step}"
        lines = visible(text).rstrip().replace("\n", "\n    ")
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _SAFE, 0o666)
            with os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{stamp} {where}: {lines}\n")


@contextlib.contextmanager
def logged(log: RunLog | None) -> Iterator[None]:
    """Write the warnings of or1's loggers to the log, and the error that ends the block."""
    if log is None:
        yield
        return
    handler, logger = _Handler(log), logging.getLogger("or1")
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        log.write(f"ended by {type(error).__name__}: {error}".removesuffix(": "))
        raise
    finally:
        logger.removeHandler(handler)


class _Handler(logging.Handler):
    def __init__(self, log: RunLog):
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.write(record.getMessage())
        # Once a logger has a handler, logging no longer falls back to the handler that prints on stderr.
        if not logging.getLogger().handlers and logging.lastResort is not None:
            logging.lastResort.handle(record)


def read_log(run_dir: Path, most: int) -> tuple[list[str], bool]:
    """Return the last `most` lines of the log, and True if there are earlier ones. Without a log: no lines, False."""
    limit = 1000 * most
    with contextlib.suppress(OSError), os.fdopen(os.open(run_dir / NAME, os.O_RDONLY | _SAFE), "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - limit))
        lines = file.read(limit).decode("utf-8", "replace").splitlines()
        # The first line may be incomplete.
        lines = lines[1:] if size > limit else lines
        return lines[-most:], size > limit or len(lines) > most
    return [], False
