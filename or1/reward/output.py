"""A log of limited size for the output of reward functions.

The function writes to a pipe, and the worker that forked it reads the other end. A full disk or a full log therefore
never affects the function. Several workers append to the same file, and every line stays whole.
"""

from __future__ import annotations

import contextlib
import os

from or1.core.text import visible

LOG_NAME = "reward.log"
"""File name in the folder of a run or of results."""
LIMIT_BYTES = 16 << 20
"""Largest size of the file, over all workers and restarts of a run."""
_LINE_BYTES = 1 << 16


class OutputLog:
    """The read end of the pipe, and the log file. The file is created with the first line.

    path   log file; a symbolic link is not followed
    limit  largest size in bytes; the last line then reports that the log is full
    """

    def __init__(self, path: str, limit: int = LIMIT_BYTES):
        self._path, self._limit = path, limit
        self._read: int | None = None
        self._rest = b""
        self._full = False

    def open(self) -> int:
        """Open a new pipe and return its write end, which the caller closes."""
        self.close()
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        return write

    def fileno(self) -> int | None:
        """Return the descriptor to poll, or None if the pipe is closed."""
        return self._read

    def drain(self) -> None:
        """Copy the bytes in the pipe to the log."""
        with contextlib.suppress(BlockingIOError):
            while self._read is not None:
                data = os.read(self._read, _LINE_BYTES)
                if not data:
                    os.close(self._read)
                    self._read = None
                elif not self._full:
                    self._take(data)

    def end_line(self) -> None:
        """Copy the bytes in the pipe to the log and end an unfinished line, since the output of a job ends with it."""
        self.drain()
        if self._rest:
            self._append(self._rest + b"\n")
            self._rest = b""

    def close(self) -> None:
        """Copy the rest of the pipe to the log and close the pipe, even if a process still has its write end open."""
        self.end_line()
        if self._read is not None:
            os.close(self._read)
            self._read = None

    def _take(self, data: bytes) -> None:
        whole, newline, self._rest = (self._rest + data).rpartition(b"\n")
        if len(self._rest) > _LINE_BYTES:
            whole, newline, self._rest = whole + newline + self._rest, b"\n", b""
        if newline:
            self._append(whole + newline)

    def _append(self, lines: bytes) -> None:
        # Escape sequences in a model's text would control the terminal of the person who reads the file.
        text = visible(lines.decode("utf-8", "replace")).encode()
        note = f"--- full ({self._limit:,} bytes): later output is lost ---\n".encode()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        # A log that cannot be written must not cost a reward.
        with contextlib.suppress(OSError):
            file = os.open(self._path, flags, 0o666)
            try:
                room = self._limit - os.fstat(file).st_size - len(note)
                self._full = len(text) > room
                if self._full:
                    text = text[: max(room - 1, 0)].decode("utf-8", "ignore").encode() + b"\n" + note
                # room < 0: the note is already there. One write, since O_APPEND keeps each write whole.
                if room >= 0:
                    os.write(file, text)
            finally:
                os.close(file)
