"""What a patched model has to say: one line when it is patched, one if training goes past it."""

from __future__ import annotations

import logging
import os
import sys

LOGGER = logging.getLogger("or1.integrations")


class _Screen(logging.Handler):
    """Writes to stderr where the program has set up no logging of its own, which would hide lines of level INFO."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            sys.stderr.write(f"{self.format(record)}\n")


def say(level: int, message: str) -> None:
    """Log a line of the logger "or1.integrations", in the first of several ranks only."""
    if os.environ.get("RANK", "0") != "0":
        return
    if not any(isinstance(handler, _Screen) for handler in LOGGER.handlers):
        LOGGER.addHandler(_Screen())
        if LOGGER.level == logging.NOTSET:
            LOGGER.setLevel(logging.INFO)
    LOGGER.log(level, message)
