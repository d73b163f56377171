"""Numbers and text for people."""

from __future__ import annotations

import math

from or1.core.text import clock, duration, sparkline, value_text, visible


def test_numbers_for_people():
    assert [duration(s) for s in (0.4, 42, 59.7)] == ["0.4 s", "42 s", "1 min 00 s"]
    assert [duration(s) for s in (192, 18420)] == ["3 min 12 s", "5 h 07 min"]
    assert [clock(s) for s in (0.4, 153, 3753, 360_000)] == ["0:00", "2:33", "1:02:33", "100:00:00"]
    kinds = ("fixed3", "fixed4", "short", "tokens", "count", "percent", "percent0")
    assert [value_text(0.1234567, k) for k in kinds] == ["0.123", "0.1235", "0.123", "0", "0.123", "12.3 %", "12%"]
    assert value_text(math.nan, "count") == "-" and value_text(24_500, "count") == "24.5 k"


def test_sparkline_spans_its_range_in_at_most_width_cells():
    assert sparkline([], 8) == ""
    assert sparkline([1.0, 1.0], 8) == "\u2584\u2584"
    assert sparkline([0.0, 0.5, 1.0], 8, ascii_only=True) == "_+@"
    assert len(sparkline(list(map(float, range(1000))), 32)) == 32
    assert len(sparkline([-1e308, 1e308], 8)) == 2


def test_invisible_characters_are_spelt_out():
    assert visible("a\x1b[31m\u202eb\n\t") == "a<U+001B>[31m<U+202E>b\n\t"
