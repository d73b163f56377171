"""The table of a tuning: every candidate, its seconds and error, and why it is out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from or1.core.text import visible
from or1.report.console import default_console
from or1.tune.choice import Record, Trial

if TYPE_CHECKING:
    from rich.console import Console

_WHAT = {
    "threads": "threads",
    "gemms": "bf16 GEMMs",
    "head": "LM head",
    "chunk": "head chunk",
    "attention": "attention",
    "mlp": "MLP tiles",
}


def print_tuning(record: Record, kept: str, console: Console | None = None) -> None:
    """Print the candidates, the rates, the choice, and where it is kept."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    console = console or default_console()
    device, case = record.key["device"], record.key["case"]
    console.print(Text(visible(f"or1 tune: {device['name']}, {case['dtype']}, rows of {case['tokens']:,} tokens")))
    console.print(Text(f"  {_shapes(case)}", style="dim"), soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="dim")
    for name in ("", "candidate"):
        table.add_column(name)
    for name in ("median", "best", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for place, trial in enumerate(record.trials):
        first = not place or record.trials[place - 1].group != trial.group
        if first and place:
            table.add_section()
        name = _WHAT.get(trial.group, trial.group) if first else ""
        remark = "chosen" if trial.chosen else trial.why_out
        style = "bold" if trial.chosen else ""
        cells = [trial.name, _seconds(trial.median), _seconds(trial.best), _error(trial), remark]
        table.add_row(Text(visible(name)), *(Text(visible(cell)) for cell in cells), style=style)
    console.print(table)
    console.print(Text("error: against fp64, in units of plain torch's in the same dtype; at most 2", style="dim"))
    for line in _closing(record, kept):
        console.print(Text(visible(line)), soft_wrap=True)


def _shapes(case: dict[str, Any]) -> str:
    text = f"LM head {case['head_tokens']:,} x {case['hidden']:,} x {case['vocab']:,}"
    if case["heads"]:
        text += (
            f", attention {case['attention_tokens']:,} tokens in documents of {case['document']:,}, "
            f"{case['heads']} heads, {case['kv_heads']} for keys"
        )
    else:
        text += f", attention not measured: it has {case['why_no_attention']}"
    return text + (f", MLP {case['mlp_tokens']:,} x {case['intermediate']:,}" if case["intermediate"] else "")


def _closing(record: Record, kept: str) -> list[str]:
    lines = [f"choice: {record.choice.line()}"]
    if record.rates:
        rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in record.rates.items())
        lines.append(f"TFLOP/s: {rates} (or1 plan uses these)")
    lines.append(f"kept in {kept}")
    if record.key["device"]["kind"] == "cpu":
        lines.append('runs on the CPU use the choice with tune = "on" alone')
    return lines


def _seconds(value: float) -> str:
    if math.isinf(value):
        return "-"
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _error(trial: Trial) -> str:
    return "-" if trial.error is None else f"{trial.error:.2g}"
