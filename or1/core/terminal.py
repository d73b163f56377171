"""Safe output to the terminal: control characters in messages are shown as text.

Error messages quote responses, data files, servers and model folders. Escape sequences in such text could clear the
screen, set the window title, or imitate a line of or1's own output.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TextIO

from or1.core.text import visible


def tell(text: object) -> None:
    """Print a message on standard error with control characters made visible; newlines are kept."""
    print(visible(text), file=sys.stderr, flush=True)


def tell_traceback(error: BaseException) -> None:
    """Print the traceback of an error in Python's format, through `tell`."""
    tell("".join(traceback.format_exception(error)).rstrip("\n"))


def guard_terminal() -> None:
    """Filter tracebacks, log lines and warnings of this process through `visible`, whichever library writes them."""
    sys.excepthook = _show_traceback
    threading.excepthook = _show_traceback_of_thread
    logging.setLogRecordFactory(_VisibleRecord)
    if sys.stdout is not None:
        sys.stdout = _Output(sys.stdout)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: visible(plain(*args, **options))


class _Output:
    """Standard output that survives a closed pipe or a full disk: lines are dropped, the run continues."""

    def __init__(self, stream: TextIO):
        self._stream, self._lost = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, or drop it if the stream is broken. Return the length of the text."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write or drop every line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream unless it is broken."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            if not self._lost:
                action()
        except OSError as error:
            self._lost = True
            # Python flushes again at exit and would fail again, so the descriptor is redirected to /dev/null.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            tell(f"or1: standard output can no longer be written ({error}); further output there is dropped")


def _show_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    tell("".join(traceback.format_exception(kind, error, where)).rstrip("\n"))


def _show_traceback_of_thread(found: threading.ExceptHookArgs) -> None:
    if found.exc_value is not None and found.exc_type is not SystemExit:
        name = found.thread.name if found.thread is not None else "(ended)"
        tell(f"Exception in thread {name}:")
        _show_traceback(found.exc_type, found.exc_value, found.exc_traceback)


class _VisibleRecord(logging.LogRecord):
    """Log record that filters its text through `visible`, whichever handler formats the record."""

    def getMessage(self) -> str:
        if self.exc_info and self.exc_info[0] is not None and not self.exc_text:
            # logging.Formatter reuses exc_text if it is set; otherwise it would format the raw traceback.
            self.exc_text = visible("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))
        return visible(super().getMessage())
