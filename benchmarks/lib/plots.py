"""The plot of the head: time and peak memory against tokens, in the style of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import style
from benchmarks.lib.conclusion import OURS, PLAIN
from benchmarks.lib.measure import device_name

Row = dict[str, Any]
_GEMMS = "bare GEMMs"
_MOST_PEERS = 2
# Least distance of two labels, as a share of the axis' height.
_LABEL_GAP = 0.06


def plot_head(path: Path, rows: Sequence[Row]) -> Path | None:
    """Plot task "policy" of or1, naive torch, the fastest peers and the bare GEMMs. Return the path.

    Returns None for fewer than two sizes of a shape.
    """
    shapes = _shapes(rows)
    if not shapes:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style.rc()):
        figure = Figure(figsize=(6.2 * len(shapes), 6.4), layout="constrained")
        axes = figure.subplots(2, len(shapes), squeeze=False)
        for column, lines in enumerate(shapes):
            top, bottom = axes[:, column]
            any_row = next(iter(lines.values()))[0]
            title = f"{any_row['shape']}: hidden {any_row['hidden']:,}, vocabulary {any_row['vocab']:,}, "
            top.set_title(title + any_row["dtype"], loc="left")
            _panel(top, lines | _bound(lines), "ms", "milliseconds, forward and backward")
            _panel(bottom, lines, "peak_extra_gib", "peak extra memory, MiB", scale=1024)
            bottom.set_xlabel("tokens")
        figure.suptitle(f"LM head with the policy loss\n{device_name()}", x=0.01, ha="left", fontsize=9.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)
    return path


def _shapes(rows: Sequence[Row]) -> list[dict[str, list[Row]]]:
    """Return for each shape and dtype the lines to draw, by name: rows in the order of their tokens."""
    series: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for r in rows:
        if (r["logits"], r["masked"], r["tf32"], r["task"]) == ("peaked", 0.0, False, "policy"):
            lines = series.setdefault((r["shape"], r["dtype"]), {})
            lines.setdefault(r["variant"], []).append(r)
    shapes = []
    for lines in series.values():
        for line in lines.values():
            line.sort(key=lambda r: r["tokens"])
        if any(len(line) > 1 for line in lines.values()):
            # or1's other variants lie under or1's own line.
            peers = [name for name in lines if name != PLAIN and not name.startswith(OURS)]
            peers.sort(key=lambda name: lines[name][-1]["ms"] / lines[name][-1]["gemms_ms"])
            names = (OURS, PLAIN, *peers[:_MOST_PEERS])
            shapes.append({name: lines[name] for name in names if name in lines})
    return [lines for lines in shapes if lines]


def _bound(lines: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Return the line of the bare GEMMs: the best time of all that were measured beside the variants."""
    best: dict[int, Row] = {}
    for r in (r for line in lines.values() for r in line):
        if r["tokens"] not in best or r["gemms_ms"] < best[r["tokens"]]["ms"]:
            best[r["tokens"]] = {"tokens": r["tokens"], "ms": r["gemms_ms"]}
    return {_GEMMS: [best[tokens] for tokens in sorted(best)]}


def _panel(ax: Any, lines: Mapping[str, list[Row]], key: str, label: str, scale: float = 1.0) -> None:
    ends = {}
    colors = iter(style.PEERS)
    for name, line in lines.items():
        # A logarithmic axis has no place for a call that needed no extra memory.
        points = [(r["tokens"], scale * r[key]) for r in line if r[key] > 0]
        if not points:
            continue
        fixed = {OURS: style.OURS, PLAIN: style.PLAIN, _GEMMS: style.BOUND}
        color = fixed[name] if name in fixed else next(colors)
        dash = (0, (4, 3)) if name == _GEMMS else "-"
        ax.plot(*zip(*points, strict=True), color=color, linestyle=dash, linewidth=2.2 if name == OURS else 1.4)
        ax.plot(*zip(*points, strict=True), "o", color=color, markersize=3.2)
        ends[name] = (*points[-1], color)
    ax.set_ylabel(label)
    ax.set(xscale="log", yscale="log")
    ax.grid(axis="y")
    sizes = sorted({r["tokens"] for line in lines.values() for r in line})
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.minorticks_off()
    if ends:
        style.plain_numbers(ax.yaxis)
        _label_ends(ax, ends)


def _label_ends(ax: Any, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write each line's name beside its last point, in the line's colour, without overlaps."""
    low, high = (math.log(limit) for limit in ax.get_ylim())
    heights = style.spaced([(math.log(y) - low) / (high - low) for _, y, _ in ends.values()], _LABEL_GAP)
    for (name, (_, _, color)), height in zip(ends.items(), heights, strict=True):
        weight = "bold" if name == OURS else "normal"
        ax.text(1.01, height, name, transform=ax.transAxes, va="center", color=color, fontweight=weight)
