"""The whole training step beside its peers: `python -m benchmarks.step OUT_DIR [--parts ...]`.

Times forward, backward and optimizer on random weights: or1, TRL's GRPO step (its default path and with Liger's
layers), and plain transformers with all logits. Without a GPU a scaled-down set runs. Every case is a process of its
own with a time limit. OUT_DIR/step.json is rewritten after every case.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.step.suite import PARTS, run_parts, table


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows with aligned columns. The text of a failure may overlap the empty cells after it."""
    widths = [max(len(row[c]) for row in rows if c != 3 or row[4]) for c in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path, help="folder for step.json")
    parser.add_argument("--parts", help=f"comma-separated, of {', '.join(PARTS)} (default: all that can run here)")
    parser.add_argument("--case-seconds", type=float, default=230, help="limit of one case (default 230)")
    parser.add_argument("--seconds", type=float, default=460, help="start no case after this long (default 460)")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",") if options.parts else _default_parts()
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.out_dir.mkdir(parents=True, exist_ok=True)
    results = run_parts(parts, options.out_dir / "step.json", options.case_seconds, options.seconds)
    print()
    print_table(table(results))
    print(f"\n{options.out_dir / 'step.json'}")
    return 0


def _default_parts() -> list[str]:
    import torch

    return [p for p in PARTS if p != "cpu"] if torch.cuda.is_available() else ["cpu"]


if __name__ == "__main__":
    sys.exit(main())
