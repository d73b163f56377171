"""Tolerant access to the records of metrics.jsonl, whose values may be missing or of another type."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

# At most nine digits: int() raises ValueError for thousands of digits.
AVG_KEY = re.compile(r"eval/([^/]+)/avg@([0-9]{1,9})")


Record = Mapping[str, Any]


def number(value: object, default: float = math.nan) -> float:
    """Return a metric as a float; `default` if the value is missing, not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return default
    try:
        result = float(value)
    except OverflowError:
        return default
    return result if math.isfinite(result) else default
