"""What a reward function prints, kept in one file of limited size.

The function writes to a pipe and the worker that forked it reads the other end. So a full disk or a full log never
reaches the function, and each line arrives whole although several workers append to the same file.
"""

from __future__ import annotations

import contextlib
import os

from or1.core.text import visible

LOG_NAME = "reward.log"
"""In the folder of a run or of results."""
LIMIT_BYTES = 16 << 20
"""Size of the file, over all workers and restarts of a run."""
_LINE_BYTES = 1 << 16


class OutputLog:
    """The reading end of the pipe, and the file behind it. The file is made with the first line.

    path   where the lines go; a link is not followed
    limit  bytes after which a last line says that the log is full
    """

    def __init__(self, path: str, limit: int = LIMIT_BYTES):
        self._path, self._limit = path, limit
        self._read: int | None = None
        self._rest = b""
        self._full = False

    def open(self) -> int:
        """Begin a new pipe; returns its writing end, which the caller closes."""
        self.close()
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        return write

    def fileno(self) -> int | None:
        """The descriptor to wait for, None when there is nothing to read any more."""
        return self._read

    def drain(self) -> None:
        """Take over what has been written so far."""
        with contextlib.suppress(BlockingIOError):
            while self._read is not None:
                data = os.read(self._read, _LINE_BYTES)
                if not data:
                    os.close(self._read)
                    self._read = None
                elif not self._full:
                    self._take(data)

    def end_line(self) -> None:
        """Take over all that has been written, an unfinished line as a whole one: a job's text ends with the job."""
        self.drain()
        if self._rest:
            self._append(self._rest + b"\n")
            self._rest = b""

    def close(self) -> None:
        """Take over the rest and close the pipe, whoever else still holds its end."""
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
        # Escape sequences of a model's text would steer the terminal of whoever reads the file.
        text = visible(lines.decode("utf-8", "replace")).encode()
        note = f"--- full ({self._limit:,} bytes): what is printed from here on is lost ---\n".encode()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        # A log that cannot be written must not cost a reward.
        with contextlib.suppress(OSError):
            file = os.open(self._path, flags, 0o666)
            try:
                room = self._limit - os.fstat(file).st_size - len(note)
                self._full = len(text) > room
                if self._full:
                    text = text[: max(room - 1, 0)].decode("utf-8", "ignore").encode() + b"\n" + note
                # Not even the note fits behind a note. One call, for O_APPEND keeps the lines of workers apart.
                if room >= 0:
                    os.write(file, text)
            finally:
                os.close(file)
