"""Output of measurements: tables on the terminal, JSON files, a plot of time and memory against tokens."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.lib.measure import stamp

_SETTING = ("shape", "tokens", "logits", "masked", "dtype", "tf32")


def write_json(path: Path, rows: Sequence[dict], **more: object) -> Path:
    """Write rows with a stamp of commit, device and versions. Return the path. The file is replaced atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(stamp() | more | {"rows": list(rows)}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def show_head(console: Console, rows: Sequence[dict], skipped: dict[str, str]) -> None:
    """Print one table a setting, fastest first within a task; then the skipped variants and the reasons."""
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault(tuple(r[k] for k in _SETTING), []).append(r)
    for (shape, tokens, logits, masked, dtype, tf32), group in groups.items():
        title = f"{shape}: {tokens} tokens, {logits}, {masked:.0%} masked, {dtype}" + (", TF32" if tf32 else "")
        table = Table(title=title, title_justify="left", header_style="bold")
        for name in ("task", "variant"):
            table.add_column(name)
        for name in ("ms", "x GEMMs", "peak GiB", "TFLOP/s", "err logp", "err H", "err dH", "err dW"):
            table.add_column(name, justify="right")
        for r in sorted(group, key=lambda r: (r["task"] != "policy", r["task"], r["ms"])):
            errors = (("-" if x is None else f"{x:.0e}") for x in r["error"].values())
            table.add_row(
                r["task"],
                r["variant"],
                f"{r['ms']:.1f}",
                f"{r['to_gemms']:.2f}",
                f"{r['peak_extra_gib']:.3f}",
                f"{r['tflops']:.3g}",
                *errors,
            )
        console.print(table)
    for name, why in skipped.items():
        console.print(f"skipped {name}: {why}", highlight=False)


def show_plain(console: Console, title: str, rows: Sequence[dict]) -> None:
    """Print rows with equal keys as one table."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", header_style="bold")
    for key in rows[0]:
        table.add_column(key)
    for r in rows:
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in r.values()))
    console.print(table)


def plot_head(path: Path, rows: Sequence[dict]) -> Path | None:
    """Plot time and peak memory of task "policy" against tokens. Return the path, or None for fewer than two sizes."""
    kept = [
        r for r in rows if (r["logits"], r["masked"], r["tf32"]) == ("peaked", 0.0, False) and r["task"] == "policy"
    ]
    series: dict[str, dict[str, list[dict]]] = {}
    for r in kept:
        series.setdefault(f"{r['shape']} {r['dtype']}", {}).setdefault(r["variant"], []).append(r)
    series = {shape: lines for shape, lines in series.items() if any(len(line) > 1 for line in lines.values())}
    if not series:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(series), 7), layout="constrained")
    axes = figure.subplots(2, len(series), squeeze=False)
    for column, (shape, lines) in enumerate(series.items()):
        for line_rows in lines.values():
            line_rows.sort(key=lambda r: r["tokens"])
        for axis, key, label in zip(axes[:, column], ("ms", "peak_extra_gib"), ("ms", "peak extra GiB"), strict=True):
            for name, line in lines.items():
                mine = name.startswith("or1")
                axis.plot(
                    [r["tokens"] for r in line],
                    [r[key] for r in line],
                    "o-" if mine else "s--",
                    linewidth=2 if mine else 1,
                    label=name,
                )
            axis.set(yscale="log", xlabel="tokens", ylabel=label)
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
        axes[0, column].set_title(shape)
        axes[0, column].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
