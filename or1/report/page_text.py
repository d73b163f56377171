"""Text of a run in a page: escaped, with invisible characters shown, and values of a config as words."""

from __future__ import annotations

import html
import json
import time

from or1.core.text import visible

DEEPEST = 20
"""Nesting levels of a config that are shown; or1's own has four."""


def escaped(value: object) -> str:
    """Escape untrusted text for HTML content or a quoted attribute; show invisible characters by their code."""
    return html.escape(visible(value))


def clock(seconds: float) -> str:
    """Return a time of the clock in UTC, "-" if it is none."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError, TypeError):
        return "-"


def plain(value: object, depth: int = 0) -> str:
    """Return a value of JSON as words, without braces and quotes."""
    if depth == DEEPEST:
        return "..."
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(plain(item, depth + 1) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(item, depth + 1)}" for key, item in value.items()) or "-"
    return value if isinstance(value, str) else json.dumps(value)
