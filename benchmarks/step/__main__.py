"""The whole training step beside its peers: `python -m benchmarks.step OUT_DIR [--model DIR --rollout FILE]`.

Times forward, backward and optimizer on random weights: or1, TRL's GRPO step (its default path and with Liger's
layers), and plain transformers with all logits. Without a GPU a scaled-down set runs. --model DIR takes the weights of
a Hugging Face folder instead, and --rollout FILE the responses that benchmarks.real.make sampled. Every case is a
process of its own with a time limit. OUT_DIR/step.json is rewritten after every case.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.step.suite import PARTS, model_cases, run_chains, run_parts, table


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
    parser.add_argument("--model", type=Path, metavar="DIR", help="take weights from this folder; needs --rollout")
    parser.add_argument("--rollout", type=Path, metavar="FILE", help="rollouts of python -m benchmarks.real.make")
    parser.add_argument(
        "--responses", default="addition=16,questions=8", help="section=count of --rollout (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.rollout is None):
        parser.error("--model and --rollout belong together; give both or neither")
    parts = options.parts.split(",") if options.parts else _default_parts()
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.out_dir.mkdir(parents=True, exist_ok=True)
    out, limits = options.out_dir / "step.json", (options.case_seconds, options.seconds)
    if options.model:
        batches = {
            name: int(count) for name, _, count in (part.partition("=") for part in options.responses.split(","))
        }
        cases = model_cases(str(options.model.resolve()), str(options.rollout.resolve()), batches)
        results = run_chains([[case] for case in cases], out, *limits)
    else:
        results = run_parts(parts, out, *limits)
    print()
    print_table(table(results))
    print(f"\n{out}")
    return 0


def _default_parts() -> list[str]:
    import torch

    return [p for p in PARTS if p != "cpu"] if torch.cuda.is_available() else ["cpu"]


if __name__ == "__main__":
    sys.exit(main())
