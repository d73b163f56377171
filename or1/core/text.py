"""Formatting of numbers and text for people, in the terminal and in the report."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

# C0 and C1 controls could steer a terminal or corrupt a page; bidirectional overrides could reorder the text.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BLOCKS, _ASCII_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588", "_.-=+*#@"


def visible(text: object) -> str:
    """Return text with its control and bidirectional characters spelt out: an escape becomes <U+001B>."""
    return _UNSEEN.sub(lambda found: f"<U+{ord(found[0]):04X}>", str(text))


def duration(seconds: float) -> str:
    """Return seconds in words: 42 s, 3 min 12 s, 5 h 07 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def clock(seconds: float) -> str:
    """Return seconds in clock format, which needs few columns: 0:42, 2:33, 1:02:33."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def count_text(value: float) -> str:
    """Return a count in at most four digits with a suffix: 12600000 -> 12.6 M."""
    for least, unit, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / unit:.3g} {suffix}"
    return f"{value:,.0f}"


def value_text(value: float, kind: str) -> str:
    """Return a metric as text, "-" if not finite.

    kind  fixed3, fixed4, tokens, count, percent, percent0 or short
    """
    if not math.isfinite(value):
        return "-"
    match kind:
        case "fixed3":
            return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.3g}"
        case "fixed4":
            return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"
        case "tokens":
            return f"{value:,.0f}"
        case "count":
            return f"{value:.3g}" if abs(value) < 100 else count_text(value)
        case "percent":
            return f"{100 * value:.1f} %"
        case "percent0":
            return f"{100 * value:.0f}%"
        case _:
            return f"{value:.3g}"


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """Return finite values as at most `width` block characters, each the mean of an equal share of the values."""
    if not values:
        return ""
    cells = min(width, len(values))
    bounds = [len(values) * i // cells for i in range(cells + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    span = high - low
    if not 0 < span < math.inf:
        return blocks[3] * cells
    return "".join(blocks[round((mean - low) / span * (len(blocks) - 1))] for mean in means)
