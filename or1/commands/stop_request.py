"""SIGTERM as a request to stop: the first ends the run, the second ends the process at once.

A rollout at work is cut short and kept. Training and evaluation continue to the end of the step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import TracebackType

EXIT_TERMINATED = 128 + signal.SIGTERM


class StopRequest:
    """A context in which the first SIGTERM sets `requested`, and the second one ends the process.

    Python runs signal handlers in the main thread, between two bytecode instructions. A main thread that waits in a
    collective does not reach the next instruction. So a separate thread counts the signals: it reads the file
    descriptor to which Python's C-level handler writes them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def is_requested(self) -> bool:
        """Return True after the first SIGTERM."""
        return self.requested

    def __enter__(self) -> StopRequest:
        self._former = signal.signal(signal.SIGTERM, lambda *_: None)
        self._former_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._count, name="or1-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._former_fd)
        signal.signal(signal.SIGTERM, self._former)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _count(self) -> None:
        while data := os.read(self._read, 16):
            for number in data:
                if number != signal.SIGTERM:
                    continue
                if self.requested:
                    _tell("SIGTERM again: ending at once; the newest committed checkpoint is kept")
                    os._exit(EXIT_TERMINATED)
                self.requested = True
                _tell(
                    "SIGTERM: a rollout ends now and is kept, else the run ends after the current step is committed; "
                    "send it again to end at once"
                )


def _tell(text: str) -> None:
    # Not `terminal.tell`: print takes a lock on its buffer, which the main thread may hold.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\nor1: {text}\n".encode())
