"""Where sharing prompts pays: `python -m benchmarks.prefix OUT_DIR`.

One group of responses behind one prompt, forward and backward, shared and not shared in turn, over prompts from short
to long. Prints the speed-up against the share of tokens saved, and the share from which on sharing is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# Before torch: threads that spin at barriers would measure the machine's other work; or1 itself sets the same.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from benchmarks.measure import interleaved, stamp
from benchmarks.step_batch import ARCHITECTURES, make_model
from or1.config import ModelConfig, OptimConfig
from or1.core.types import TrainSequence
from or1.dist.oom_retry import RowBudget
from or1.model.attention import choose_backend, register
from or1.model.prepare import prepare_model
from or1.model.shared_prompts import saved_fraction
from or1.train.metrics import UpdateStats
from or1.train.optim import MasterAdamW, UpdateResult
from or1.train.rank_rows import Policy
from or1.train.update import update


def group_of(prompt: int, responses: list[int], vocab: int) -> list[TrainSequence]:
    """Responses of the given lengths to one prompt."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, prompt).astype(np.int32)
    return [
        TrainSequence(ids, rng.integers(0, vocab, n).astype(np.int32), np.zeros(n, np.float32), (-1.0) ** i)
        for i, n in enumerate(responses)
    ]


def measure(architecture: str, prompts: list[int], responses: list[int], rounds: int) -> list[dict[str, float]]:
    """Seconds of an update with and without sharing, for each prompt length."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model(architecture, dtype, device, register(choose_backend("auto", device, dtype)))
    model = prepare_model(model, ModelConfig(path=architecture, gradient_checkpointing="layer"), device)
    optimizer = MasterAdamW(model, OptimConfig())
    # Only the gradient is timed: the optimizer's step costs both sides the same.
    optimizer.step_if_finite = lambda loss: (optimizer.zero_grad(), UpdateResult(0.0, 0.0, False))[1]
    rows = []
    for prompt in prompts:
        sequences = group_of(prompt, responses, ARCHITECTURES[architecture]["vocab_size"])

        def run(sharing: str, sequences: list[TrainSequence] = sequences) -> None:
            update(Policy(model, RowBudget(1 << 20), sharing=sharing), optimizer, sequences, 0.0, UpdateStats())

        times = interleaved({s: lambda s=s: run(s) for s in ("off", "on")}, device, rounds)
        best = {sharing: min(values) for sharing, values in times.items()}
        saved = saved_fraction([s.prompt_ids for s in sequences], responses)
        rows.append(
            {
                "prompt": prompt,
                "saved": saved,
                "off_s": best["off"],
                "on_s": best["on"],
                "speedup": best["off"] / best["on"],
            }
        )
        print(
            f"{prompt:>8} {saved:>8.1%} {best['off']:>9.3f} {best['on']:>9.3f} {rows[-1]['speedup']:>8.2f}x", flush=True
        )
    return rows


def break_even(rows: list[dict[str, float]]) -> float | None:
    """Smallest saved share from which on every measurement was at least as fast with sharing; None if none was."""
    found = None
    for row in sorted(rows, key=lambda r: -r["saved"]):
        if row["speedup"] < 1:
            break
        found = row["saved"]
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command."""
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
