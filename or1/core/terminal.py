"""What goes to standard error beside the display, with every escape sequence spelt out.

Error messages quote responses, data files, servers and model folders. A terminal would obey the escape sequences in
them: clear the screen, set the title, or show a line that or1 never wrote.
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
    """Print a message on standard error; its newlines stay, other invisible characters are spelt out."""
    print(visible(text), file=sys.stderr, flush=True)


def tell_traceback(error: BaseException) -> None:
    """Print the traceback of an error as Python does, by `tell`."""
    tell("".join(traceback.format_exception(error)).rstrip("\n"))


def guard_terminal() -> None:
    """Make tracebacks, log lines and warnings of this process go through `visible`, whichever library writes them."""
    sys.excepthook = _show_traceback
    threading.excepthook = _show_traceback_of_thread
    logging.setLogRecordFactory(_VisibleRecord)
    if sys.stdout is not None:
        sys.stdout = _Output(sys.stdout)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: visible(plain(*args, **options))


class _Output:
    """Standard output that may go: a pipe that is closed or a full disk loses lines of the display, and not the run."""

    def __init__(self, stream: TextIO):
        self._stream, self._lost = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop the text where that is not possible."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write all lines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or drop what was to be written."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            if not self._lost:
                action()
        except OSError as error:
            self._lost = True
            # Python flushes once more at the end, and would fail again; what is in the buffer goes nowhere.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            tell(f"or1: standard output cannot be written any more ({error}); what follows is not shown there")


def _show_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    tell("".join(traceback.format_exception(kind, error, where)).rstrip("\n"))


def _show_traceback_of_thread(found: threading.ExceptHookArgs) -> None:
    if found.exc_value is not None and found.exc_type is not SystemExit:
        name = found.thread.name if found.thread is not None else "that has ended"
        tell(f"Exception in thread {name}:")
        _show_traceback(found.exc_type, found.exc_value, found.exc_traceback)


class _VisibleRecord(logging.LogRecord):
    """A log record for whichever handler a library has installed."""

    def getMessage(self) -> str:
        if self.exc_info and self.exc_info[0] is not None and not self.exc_text:
            # A formatter keeps the text that is there, and would write a raw one otherwise.
            self.exc_text = visible("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))
        return visible(super().getMessage())
