"""Tables of benchmarks on the terminal, at most 100 columns wide: one a setting, targets, reasons of skips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.lib import conclusion
from benchmarks.lib.load import MET, NOT_JUDGED

Row = dict[str, Any]
WIDTH = 100
# Before the names of or1's rows, because a log has no bold type.
_MARK = "> "
_TASKS = {"policy": "policy loss, entropy bonus", "policy, no entropy": "policy loss, no bonus", "ce": "cross entropy"}
# Rows of these suites are compared only if they agree in these columns.
_GROUPS = {"score_rows": ("pass", "softcap", "rows", "vocab"), "packing": ("sequences", "tokens")}
_VERDICTS = {MET: "green", NOT_JUDGED: "yellow"}


def console(file: IO[str] | None = None, *, terminal: bool) -> Console:
    """Return a console of 100 columns, or of fewer if the terminal has fewer."""
    wide = Console(file=file)
    return Console(file=file, width=min(WIDTH, wide.width) if terminal else WIDTH)


def show_head(console: Console, rows: Sequence[Row]) -> None:
    """Print one table a setting with a section a task, fastest first. rows: of benchmarks.head.cases.row."""
    for group in conclusion.by_setting(rows).values():
        table = _table(_title(group[0]))
        table.add_column("variant", no_wrap=True)
        for name in ("ms", "x GEMMs", "x naive", "extra MiB", "error logp", "error grad"):
            table.add_column(name, justify="right")
        for task in sorted({r["task"] for r in group}, key=[*_TASKS, *(r["task"] for r in group)].index):
            _add_task(table, task, sorted((r for r in group if r["task"] == task), key=lambda r: r["ms"]))
        console.print(table)
    if rows:
        console.print(
            "> or1. x GEMMs, x naive: time over that of the three bare GEMMs and of naive torch, less is better. "
            "extra MiB: peak beyond the inputs. Errors against fp64: logp in nats, the largest; gradients relative, "
            "the larger of hidden and weight.",
            style="dim",
            highlight=False,
        )


def _title(row: Row) -> str:
    masked = f", {row['masked']:.0%} masked" if row["masked"] else ""
    return (
        f"{row['shape']} (hidden {row['hidden']:,}, vocabulary {row['vocab']:,}): {row['tokens']:,} tokens, "
        f"{row['logits']} logits{masked}, {row['dtype']}{', TF32' if row['tf32'] else ''}"
    )


def _add_task(table: Table, task: str, rows: Sequence[Row]) -> None:
    naive = next((r["ms"] for r in rows if r["variant"] == conclusion.PLAIN), None)
    table.add_section()
    table.add_row(Text(_TASKS.get(task, task), style="italic"))
    for r in rows:
        error = r["error"]
        gradients = [error[key] for key in ("dhidden", "dweight") if error.get(key) is not None]
        cells = [
            f"{r['ms']:,.1f}",
            f"{r['to_gemms']:.2f}",
            "-" if naive is None else f"{r['ms'] / naive:.2f}",
            f"{1024 * r['peak_extra_gib']:,.1f}",
            _error(error.get("logp")),
            _error(max(gradients, default=None)),
        ]
        _add_row(table, r["variant"], cells, ours=_ours(r))


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def show_plain(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Print rows with equal keys as tables, one for each group that may be compared; fastest first if "ms" is a key."""
    keys = _GROUPS.get(title, ())
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for values, group in groups.items():
        heading = ", ".join([title, *(f"{key} {_cell(value)}" for key, value in zip(keys, values, strict=True))])
        table = _table(heading)
        names = [key for key in group[0] if key not in keys]
        # A column of names first.
        names.sort(key=lambda key: not isinstance(group[0][key], str))
        for name in names:
            table.add_column(name, justify="left" if isinstance(group[0][name], str) else "right")
        for row in sorted(group, key=lambda r: r["ms"]) if "ms" in group[0] else group:
            first, *rest = (_cell(row[name]) for name in names)
            _add_row(table, first, rest, ours=_ours(row))
        console.print(table)


def show_targets(console: Console, rows: Sequence[Row]) -> None:
    """Print the targets and whether they were met. rows: of Target.row."""
    if not rows:
        return
    table = _table("targets")
    for name in ("target", "measured", "limit", "verdict"):
        table.add_column(name, justify="right" if name == "measured" else "left")
    for row in rows:
        verdict = row["verdict"] + (f": the machine was busy ({row['busy']})" if row["busy"] else "")
        style = _VERDICTS.get(row["verdict"], "bold red")
        table.add_row(row["target"], f"{row['value']:.3g}", conclusion.limit_of(row), Text(verdict, style=style))
    console.print(table)


def show_skipped(console: Console, skipped: Mapping[str, str]) -> None:
    """Print the reasons why something was not measured, each once with the names that the reason concerns."""
    reasons: dict[str, list[str]] = {}
    for name, why in skipped.items():
        reasons.setdefault(why, []).append(name)
    if not reasons:
        return
    console.print("not measured", style="bold")
    for why, names in reasons.items():
        console.print(Text(f"  {'; '.join(names)}: {why}"), soft_wrap=False)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, header_style="bold")


def _add_row(table: Table, name: str, cells: Sequence[str], *, ours: bool) -> None:
    table.add_row((_MARK if ours else "  ") + name, *cells, style="bold" if ours else "")


def _ours(row: Row) -> bool:
    """Return whether a row is or1's: its name begins with or1, or its passes are or1's own kernels."""
    return row.get("impl") in ("native", "triton") or any(
        str(row.get(key, "")).startswith(conclusion.OURS) for key in ("variant", "packer")
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
