"""The program in a response: the last fenced Python block of its answer."""

from __future__ import annotations

import re
from collections import deque

_BLOCK = re.compile(r"```(?:python3?|py)[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)


def last_python_block(text: str) -> str | None:
    """What the last closed block that is marked as Python holds; None if there is none. Linear in len(text)."""
    last = deque(_BLOCK.finditer(text), maxlen=1)
    return last[0][1] if last and last[0][1].strip() else None
