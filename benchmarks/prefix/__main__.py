"""Break-even of shared prompts: `python -m benchmarks.prefix OUT_DIR`.

Times forward and backward of one group of responses behind one prompt, with and without sharing in turn, over prompts
from short to long. Prints the speed-up against the share of tokens saved, and the share from which on sharing wins.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# Before torch is imported, as in or1: spinning threads would also measure the machine's other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks.lib.measure import stamp
from benchmarks.prefix.shared_prompts import break_even, measure


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix", description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path, help="folder for prefix.json")
    parser.add_argument("--rounds", type=int, default=3, help="timed updates of each side (default 3)")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    architecture, scale = ("qwen2.5-1.5b", 32) if gpu else ("tiny", 1)
    responses = [scale * n for n in (40, 120, 60, 200, 90, 50, 160, 80)]
    prompts = [scale * n for n in (2, 8, 16, 32, 64, 128, 256)]
    print(f"{architecture}, {len(responses)} responses of {min(responses)} to {max(responses)} tokens to one prompt\n")
    print(f"{'prompt':>8} {'saved':>8} {'apart s':>9} {'shared s':>9} {'speed-up':>9}")
    rows = measure(architecture, prompts, responses, options.rounds)
    share = break_even(rows)
    print("\nsharing was never faster" if share is None else f"\nsharing is faster from {share:.1%} saved tokens on")
    options.out_dir.mkdir(parents=True, exist_ok=True)
    out = options.out_dir / "prefix.json"
    out.write_text(json.dumps({"stamp": stamp(), "break_even": share, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
