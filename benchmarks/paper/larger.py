"""The larger run of the ladder: claims C3 and C4 at 192 other seeds, by the rule in RULE-2.md.

    python -m benchmarks.paper.larger OUT_DIR [--jobs N] [--seeds N]

Writes README.md, plots and larger.json to OUT_DIR. OUT_DIR/work keeps every finished run, so a stopped run resumes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.lib.measure import stamp
from benchmarks.paper import page, study
from benchmarks.paper.__main__ import run_tasks
from benchmarks.paper.claims import CLAIMS
from benchmarks.paper.measures import Record
from benchmarks.paper.plots import plot

FIRST_SEED, SEEDS = 5001, 192
KEYS = ("C3", "C4")

_HEAD = """\
# The ladder, larger: C3 and C4 at {seeds} seeds

Made by `python -m benchmarks.paper.larger OUT_DIR`: {runs} runs in {processor_minutes} processor minutes, seeds from
{first_seed}; numbers in `larger.json`. Verdicts follow [RULE-2.md](../../../paper/RULE-2.md), committed before
the runs. Task, arms and measures are those of [the study](../README.md), whose verdicts stay."""


def main() -> None:
    """Run the arms of both claims and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.larger", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, a core each")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()
    claims = [claim for claim in CLAIMS if claim.key in KEYS]
    arms = list(dict.fromkeys(arm for claim in claims for arm in claim.arms))
    tasks = study.table_tasks(arms, range(FIRST_SEED, FIRST_SEED + args.seeds))
    console = Console(width=160)
    records = run_tasks(tasks, args.out / "work", args.jobs, console)
    console.print(f"page: {write_page(args.out, records, args.seeds)}", highlight=False)


def write_page(out: Path, records: Sequence[Record], seeds: int) -> Path:
    """Write README.md, the plots and larger.json to `out`. Return the page's path.

    seeds  number at which the one look is taken
    """
    of_tier, found, sections = study.of_tier(records, "A"), {}, []
    for claim in CLAIMS:
        if claim.key not in KEYS:
            continue
        checks, findings = study.findings(claim, of_tier, (seeds,))
        rows = list(zip(claim.statements, checks, findings, strict=True))
        found[claim.key] = page.as_json("A", claim, rows, of_tier)
        sections.append(page.section(claim, rows))
        plot(out / f"{claim.key}.svg", claim, of_tier)
    minutes = round(sum(r["cpu_s"] for r in records) / 60, 1)
    costs: dict[str, Any] = {"runs": len(records), "processor_minutes": minutes, "first_seed": FIRST_SEED}
    study.write(out / "larger.json", {**stamp(), **costs, "seeds": seeds, "claims": found})
    path = out / "README.md"
    path.write_text("\n\n".join([_HEAD.format(seeds=seeds, **costs), *sections]) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
