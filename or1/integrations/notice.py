"""Log lines of the integrations: one when a model is patched, one when training bypasses the patch."""

from __future__ import annotations

import logging
import os
import sys

LOGGER = logging.getLogger("or1.integrations")


class _Screen(logging.Handler):
    """A handler that writes to stderr if the program configured no logging, which would hide INFO lines."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            sys.stderr.write(f"{self.format(record)}\n")


def say(level: int, message: str) -> None:
    """Log a line with the logger "or1.integrations", on rank 0 only."""
    if os.environ.get("RANK", "0") != "0":
        return
    if not any(isinstance(handler, _Screen) for handler in LOGGER.handlers):
        LOGGER.addHandler(_Screen())
        if LOGGER.level == logging.NOTSET:
            LOGGER.setLevel(logging.INFO)
    LOGGER.log(level, message)
