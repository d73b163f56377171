"""The picture of benchmarks.real: time of heads, rows that grad_row_eps leaves out, bound and true error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.lib import style

COLORS = {"before": style.COLORS["muted"], "after": style.COLORS["s1"]}
_SECTION = "addition"


def draw(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the SVG. A panel whose file is absent stays empty."""
    import matplotlib
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(style.rc()):
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        bars, shares, bounds = figure.subplots(1, 3)
        _times(bars, files.get("times", {}).get("rows", []))
        _left_out(shares, bounds, [r for r in files.get("eps", {}).get("rows", []) if r["section"] == _SECTION])
        figure.savefig(path, metadata={"Date": None})


def _left_out(shares: Any, bounds: Any, rows: list[Mapping[str, Any]]) -> None:
    """Draw the rows and the part of the gradient that grad_row_eps leaves out."""
    # Without a bonus the bound is exact, so the losses with a bonus are drawn where they were measured.
    weighed = "policy" if any(row["task"] == "policy" for row in rows) else "policy, no entropy"
    for policy, color in COLORS.items():
        mine = _by_eps(rows, policy, "policy, no entropy")
        eps = [row["eps"] for row in mine]
        shares.plot(eps, [100 * row["share_left_out"] for row in mine], "o-", color=color, label=f"{policy} RL")
        mine = [row for row in _by_eps(rows, policy, weighed) if row["true"] > 0]
        eps = [row["eps"] for row in mine]
        bounds.plot(eps, [row["bound"] for row in mine], "s--", color=color, label=f"{policy} RL, bound")
        bounds.plot(eps, [row["true"] for row in mine], "o-", color=color, label=f"{policy} RL, true")
    shares.set(xscale="log", xlabel="grad_row_eps", ylim=(0, 100), title="rows left out, %")
    bounds.set(xscale="log", xlabel="grad_row_eps", title=f"{weighed}: gradient left out, L1")
    if any(len(line.get_xdata()) for line in bounds.lines):
        # A logarithmic axis without a point cannot be drawn.
        bounds.set_yscale("log")
    for axes in (shares, bounds):
        axes.grid(axis="y")
        axes.legend()


def _by_eps(rows: list[Mapping[str, Any]], policy: str, task: str) -> list[Mapping[str, Any]]:
    mine = [row for row in rows if (row["policy"], row["task"]) == (policy, task) and row["eps"] > 0]
    return sorted(mine, key=lambda row: row["eps"])


def _times(axes: Any, rows: list[Mapping[str, Any]]) -> None:
    """Draw CPU seconds of the policy loss on text, in both dtypes."""
    kept = [row for row in rows if row["section"] == "text" and row["task"] == "policy"][::-1]
    short = {"float32": "fp32", "bfloat16": "bf16"}
    labels = [f"{row['variant']}, {short[row['dtype']]}" for row in kept]
    colors = [style.OURS if row["variant"].startswith("or1") else style.COLORS["s0"] for row in kept]
    axes.barh(labels, [row["cpu_s"] for row in kept], color=colors)
    axes.set_title("head, policy loss, CPU s")
