"""The program in a response: the last fenced Python block of its answer."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"```(?:python3?|py)[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)


def last_python_block(text: str) -> str | None:
    """What the last closed block that is marked as Python holds; None if there is none. Linear in len(text)."""
    block = None
    for block in _BLOCK.finditer(text):
        pass
    return block[1] if block and block[1].strip() else None
