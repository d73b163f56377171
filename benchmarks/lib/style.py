"""One style for the plots of benchmarks: that of the HTML report, with its colours of light mode.

The report's own figures have CSS variables as colours, which only its page defines.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from or1.report.page_style import STYLE as _SHEET
from or1.report.page_svg import COLORS as _PLACEHOLDERS
from or1.report.page_svg import STYLE as _RC

# The first rule of the style sheet is light mode.
_LIGHT = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", _SHEET.split("}", 1)[0]))
COLORS = {name: _LIGHT[name] for name in _PLACEHOLDERS}
"""Colour by name: s0 to s8 for series, ink, muted, grid and card."""
OURS, PLAIN, BOUND = COLORS["s1"], COLORS["s8"], COLORS["muted"]
SERIES = tuple(COLORS[f"s{i}"] for i in range(1, 9))
PEERS = tuple(COLORS[name] for name in ("s2", "s3", "s5", "s7"))
"""Colours of or1, of plain torch, of a bound that nothing can beat, of series in order, and of peers."""

_NAMES = {placeholder: name for name, placeholder in _PLACEHOLDERS.items()}


def rc() -> dict[str, Any]:
    """Return matplotlib's settings, for `matplotlib.rc_context`, which must hold while a figure is made and saved.

    The background is that of a card of the report, so a picture can be read on a dark page too. An SVG holds letters
    as paths, because a viewer may lack the font, and no random names.
    """
    from cycler import cycler

    settings = {key: COLORS[_NAMES[value]] if value in _NAMES else value for key, value in _RC.items()}
    settings |= {"figure.facecolor": COLORS["card"], "savefig.facecolor": COLORS["card"]}
    settings |= {"svg.fonttype": "path", "svg.hashsalt": "or1", "legend.frameon": False, "axes.titlesize": 9.5}
    settings |= {"lines.markersize": 3.2, "lines.linewidth": 1.8}
    return settings | {"axes.titlecolor": COLORS["ink"], "axes.prop_cycle": cycler(color=SERIES)}


def plain_numbers(axis: Any) -> None:
    """Write the ticks of a logarithmic axis as plain numbers, at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def spaced(heights: list[float], gap: float) -> list[float]:
    """Return heights at least `gap` apart, each moved upwards where it is too near to the one below."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    out = list(heights)
    for lower, upper in pairwise(order):
        out[upper] = max(out[upper], out[lower] + gap)
    return out
