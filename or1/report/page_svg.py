"""Figures of the report as inline SVG: CSS variables as colours, and the values of each step as a tooltip."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from or1.core.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib needs real colours. `svg_of` replaces these placeholders by CSS variables.
COLORS = {"s0": "#0a0000", "s1": "#0a0001", "s2": "#0a0002", "s3": "#0a0003", "s4": "#0a0004", "s5": "#0a0005"}
COLORS |= {"s6": "#0a0006", "s7": "#0a0007", "s8": "#0a0008", "ink": "#0b0001", "muted": "#0b0002", "grid": "#0b0003"}
COLORS |= {"card": "#0b0004"}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "font.family": "DejaVu Sans",
    "axes.linewidth": 0.8,
    "axes.edgecolor": COLORS["grid"],
    "axes.labelcolor": COLORS["muted"],
    "text.color": COLORS["muted"],
    "xtick.color": COLORS["grid"],
    "ytick.color": COLORS["grid"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.left": False,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
"""Settings of matplotlib for every figure."""

_MOST_COLUMNS = 120
_POINTS = 72
"""Points an inch, the unit of matplotlib's SVG."""

Values = Mapping[str, Mapping[int, str]]
"""Text of the value at each step, by the label of a line."""


def svg_of(figure: Figure, title: str, values: Values) -> str:
    """Return the figure as an inline <svg> element: CSS variables as colours, unique ids, no external references.

    values  shown while the pointer is over a step, by the <title> of a transparent column, since scripts are forbidden
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace('"#', f'"#{prefix}-').replace("url(#", f"url(#{prefix}-")
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    # Not a template of `re.sub`: a title may have the name of an evaluation set, which the run's file holds.
    (view,) = re.findall(r'<svg[^>]*?(viewBox="[^"]*")', text)[:1]
    text = f'<svg {view} role="img" aria-label="{html.escape(visible(title))}">{text[text.index(">") + 1 :]}'
    text = text.replace("</svg>", f"{_columns(figure, values)}</svg>")
    return re.sub(r"\n\s*", "\n", text)


def _columns(figure: Figure, values: Values) -> str:
    """Return a transparent rectangle over all panels for each step, or for each of equal groups of many steps."""
    steps = sorted({step for of_line in values.values() for step in of_line})
    if not steps:
        return ""
    # The figure was drawn, so its layout is final. One step stands for a group, the one in the middle.
    size = math.ceil(len(steps) / _MOST_COLUMNS)
    groups = [steps[start : start + size] for start in range(0, len(steps), size)]
    chosen = [group[len(group) // 2] for group in groups]
    top, bottom = _edges(figure.axes)
    edges = [chosen[0] - 0.5, *((low + high) / 2 for low, high in pairwise(chosen))]
    edges.append(chosen[-1] + 0.5)
    width, height = figure.get_size_inches() * _POINTS
    places = [_place(figure.axes[0], edge) * width for edge in edges]
    rects = (
        f'<rect x="{left:.1f}" y="{(1 - top) * height:.1f}" width="{max(right - left, 0.1):.1f}" '
        f'height="{(top - bottom) * height:.1f}"><title>{html.escape(visible(_words(step, values)))}</title></rect>'
        for step, (left, right) in zip(chosen, pairwise(places), strict=True)
    )
    return f'<g class="hover">{"".join(rects)}</g>'


def _edges(axes: Sequence[Axes]) -> tuple[float, float]:
    """Return the upper end of the first panel and the lower end of the last, as shares of the figure's height."""
    return axes[0].get_position().y1, axes[-1].get_position().y0


def _place(ax: Axes, step: float) -> float:
    """Return the place of a step as a share of the figure's width, within the panel."""
    place, (low, high) = ax.get_position(), ax.get_xlim()
    share = (step - low) / (high - low)
    return float(place.x0 + min(max(share, 0.0), 1.0) * place.width)


def _words(step: int, values: Values) -> str:
    lines = [f"{label}: {of_line[step]}" for label, of_line in values.items() if step in of_line]
    return "\n".join([f"step {step}", *lines])
