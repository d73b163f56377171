"""The report's study in miniature; see `benchmarks.paper.history`.

    python -m benchmarks.paper.history OUT_DIR [--claims C3,C8] [--lr 1e-4] [--jobs N] [--device cpu] [--work DIR]

Writes OUT_DIR/README.md, its plots and study.json. The work folder keeps every finished run, so a stopped study
resumes with the missing runs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.paper.history.arms import ARMS, FIRST_SEED, LR
from benchmarks.paper.history.claims import CLAIMS, Claim, Record
from benchmarks.paper.history.page import summary, write_page
from benchmarks.paper.history.runs import ensure_base, run_all


def main() -> None:
    """Run the missing runs, write the page, print the verdicts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.history",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--claims", default=",".join(c.key for c in CLAIMS), help="those to run, by name")
    parser.add_argument("--lr", type=float, default=LR, help="learning rate of every run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once, a core each")
    parser.add_argument("--device", default="cpu", help="of every run: cpu or cuda")
    parser.add_argument("--work", type=Path, help="where runs are kept; OUT_DIR/work if absent")
    args = parser.parse_args()
    chosen = _chosen(parser, args.claims)
    names = list(dict.fromkeys(name for claim in chosen for name in claim.arms))
    # First seeds before second ones, so that a stopped study has every arm.
    pairs = [(n, FIRST_SEED + s) for n in names for s in range(ARMS[n].seeds)]
    pairs.sort(key=lambda pair: pair[1])
    console = Console()
    records, base_s = _run(pairs, args.work or args.out / "work", args, console)
    cost = {"runs": len(records), "processor minutes": (base_s + sum(r["cpu_s"] for r in records.values())) / 60}
    page = write_page(args.out, chosen, records, cost, args.lr)
    table = Table(title="The report's claims in miniature", title_justify="left")
    for column in ("claim", "verdict", "statements that hold"):
        table.add_column(column)
    for row in summary(chosen, records):
        table.add_row(*row)
    console.print(table)
    console.print(f"{cost['processor minutes']:.1f} processor minutes; page: {page}", highlight=False)


def _chosen(parser: argparse.ArgumentParser, keys: str) -> list[Claim]:
    by_key = {claim.key: claim for claim in CLAIMS}
    unknown = [key for key in keys.split(",") if key not in by_key]
    if unknown:
        parser.error(f"no claim {', '.join(unknown)}; there are {', '.join(by_key)}")
    return [by_key[key] for key in keys.split(",")]


def _run(
    pairs: list[tuple[str, int]], work: Path, args: argparse.Namespace, console: Console
) -> tuple[dict[tuple[str, int], Record], float]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    records: dict[tuple[str, int], Record] = {}
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("base model", total=len(pairs))
        base_s = ensure_base(work)
        for name, seed, record in run_all(pairs, work, args.jobs, args.device, args.lr):
            records[name, seed] = record
            line = f"{name}, seed {seed}: test {record['evals'][-1][1]:.1%}, {record['cpu_s']:.0f} s"
            progress.console.print(line, highlight=False)
            progress.update(bar, advance=1, description="runs")
    return records, base_s


if __name__ == "__main__":
    main()
