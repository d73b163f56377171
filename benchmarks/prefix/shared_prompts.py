"""Time of an update with and without shared prompts, for one group of responses behind one prompt."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from benchmarks.lib.measure import interleaved
from benchmarks.step.batch import ARCHITECTURES, make_model
from or1.config import ModelConfig, OptimConfig
from or1.core.types import TrainSequence
from or1.dist.oom_retry import RowBudget
from or1.model.attention import choose_backend, register
from or1.model.prepare import prepare_model
from or1.model.shared_prompts import Sharing, saved_fraction
from or1.train.metrics import UpdateStats
from or1.train.optim import MasterAdamW, UpdateResult
from or1.train.rank_rows import Policy
from or1.train.update import update


def group_of(prompt: int, responses: list[int], vocab: int) -> list[TrainSequence]:
    """Return responses of the given lengths to one prompt, in tokens."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, prompt).astype(np.int32)
    return [
        TrainSequence(ids, rng.integers(0, vocab, n).astype(np.int32), np.zeros(n, np.float32), (-1.0) ** i)
        for i, n in enumerate(responses)
    ]


def _zero_grad_only(optimizer: MasterAdamW, loss: torch.Tensor) -> UpdateResult:
    optimizer.zero_grad()
    return UpdateResult(0.0, 0.0, False)


def measure(architecture: str, prompts: list[int], responses: list[int], rounds: int) -> list[dict[str, float]]:
    """Return, for each prompt length, seconds of an update with and without sharing, and the saved share."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model(architecture, dtype, device, register(choose_backend("auto", device, dtype)))
    model = prepare_model(model, ModelConfig(path=architecture, gradient_checkpointing="layer"), device)
    optimizer = MasterAdamW(model, OptimConfig())
    # Time only the gradient, because the optimizer's step costs the same on both sides.
    optimizer.step_if_finite = partial(_zero_grad_only, optimizer)
    rows = []
    for prompt in prompts:
        sequences = group_of(prompt, responses, ARCHITECTURES[architecture]["vocab_size"])

        def run(sharing: Sharing, sequences: list[TrainSequence] = sequences) -> None:
            update(Policy(model, RowBudget(1 << 20), sharing=sharing), optimizer, sequences, 0.0, UpdateStats())

        times = interleaved({"off": partial(run, "off"), "on": partial(run, "on")}, device, rounds)
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
    """Return the smallest saved share from which on sharing was never slower, or None."""
    found = None
    for row in sorted(rows, key=lambda r: -r["saved"]):
        if row["speedup"] < 1:
            break
        found = row["saved"]
    return found
