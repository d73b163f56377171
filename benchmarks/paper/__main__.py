"""The ladder, a study of the report's claims in miniature; see `benchmarks.paper`.

    python -m benchmarks.paper OUT_DIR [--jobs N] [--first-seed S] [--work DIR]

Writes the page, its plots and study.json to OUT_DIR. The work folder keeps every finished run, so a stopped study
resumes with the missing runs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.paper import study
from benchmarks.paper.arms import ARMS
from benchmarks.paper.measures import Record
from benchmarks.paper.page import write_page
from benchmarks.paper.statistics import LOOKS


def main() -> None:
    """Run both tiers, print checks and verdicts, write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, a core each")
    parser.add_argument("--first-seed", type=int, default=study.FIRST_SEED, help="of both tiers")
    parser.add_argument("--work", type=Path, help="where runs are kept; OUT_DIR/work if absent")
    parser.add_argument("--model-seeds", type=int, default=study.MODEL_SEEDS, help="seeds of tier B")
    args = parser.parse_args()
    work, console = args.work or args.out / "work", Console(width=160)
    seeds = range(args.first_seed, args.first_seed + LOOKS[-1])
    base_s = study.ensure_base(work)
    records: list[Record] = []
    done = 0
    for look in LOOKS:
        records += run_tasks(study.table_tasks(list(ARMS), seeds[done:look]), work, args.jobs, console)
        done = look
        if study.complete(study.of_tier(records, "A")):
            break
    records += run_tasks(study.model_tasks(seeds[: args.model_seeds]), work, args.jobs, console)
    _print(records, console)
    minutes = (base_s + sum(r["cpu_s"] for r in records)) / 60
    page = write_page(args.out, records, minutes, args.first_seed)
    console.print(f"{len(records)} runs, {minutes:.1f} processor minutes; page: {page}", highlight=False)


def run_tasks(tasks: Sequence[study.Task], work: Path, jobs: int, console: Console) -> list[Record]:
    """Return the records of all tasks, while a bar counts them."""
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    records: list[Record] = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(tasks))
        for made in study.run_all(tasks, work, jobs):
            records += made
            progress.update(bar, advance=1)
    return records


def _print(records: Sequence[Record], console: Console) -> None:
    for tier in "AB":
        of_tier = study.of_tier(records, tier)
        for claim in study.claims_of(tier):
            console.print(f"\n{claim.key}  {claim.title}", style="bold", highlight=False)
            checks, found = study.findings(claim, of_tier, study.looks_of(tier, of_tier))
            for text in dict.fromkeys(f"{'passed' if c.passed else 'FAILED'}: {c.text}" for c in checks):
                console.print(f"  check {text}", highlight=False)
            for statement, finding in zip(claim.statements, found, strict=True):
                console.print(f"  {finding.verdict:28} {statement.words()}", highlight=False)


if __name__ == "__main__":
    main()
