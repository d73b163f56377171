"""GPU part: nothing inside a packed row makes the host wait for the device, under every kind of checkpointing.

A wait empties the device's queue, and the launches of the next kernels are then no longer hidden.
"""

import warnings
from collections import Counter
from functools import partial

import torch

from benchmarks.gpu.context import Context
from benchmarks.step.batch import ARCHITECTURES, make_model, ragged_batch
from or1.config import ModelConfig, OptimConfig
from or1.dist.oom_retry import RowBudget
from or1.magic.denominator import TOKEN_MEAN
from or1.model.attention import choose_backend, register
from or1.model.prepare import prepare_model
from or1.model.rows import keep_known
from or1.train.metrics import UpdateStats
from or1.train.optim import MasterAdamW
from or1.train.rank_rows import Policy, rank_rows
from or1.train.update import _train_row

_MODES = ("none", "layer", "selective", "offload")


def run(context: Context) -> None:
    """Train rows under each kind of checkpointing, and count the calls that wait for the device."""
    for mode in _MODES:
        found = waits_of(context, mode)
        if context.device.type != "cuda":
            context.skip("waits for the device", "there is no device to wait for; the rows themselves ran")
        else:
            places = dict(found.most_common(5))
            context.check(f"no wait inside a row, checkpointing {mode}", not found, waits=found.total(), places=places)


def waits_of(context: Context, mode: str) -> Counter:
    """Return where the host waited for the device in two rows, and how often; empty on a CPU."""
    device = context.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model("tiny", dtype, device, register(choose_backend("auto", device, dtype)))
    model = prepare_model(model, ModelConfig(path="tiny", gradient_checkpointing=mode, liger="off"), device)
    policy = Policy(model, RowBudget(1 << 20))
    long = 64 if context.rehearse else 8192
    rows = rank_rows(policy, ragged_batch(long, 2, long // 8, ARCHITECTURES["tiny"]["vocab_size"]), 2 * long)
    train = partial(_train_row, policy, MasterAdamW(model, OptimConfig()), 0.001, TOKEN_MEAN, 1.0)

    def all_rows() -> None:
        stats = UpdateStats()
        for _, row in rows:
            batch = keep_known(row)
            stats.add_row(batch, train(batch)[1])

    # The first rows compile kernels and allocate, which waits and is not the matter here.
    all_rows()
    if not _watchable(device):
        return Counter()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            all_rows()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))


def _watchable(device: torch.device) -> bool:
    return device.type == "cuda"
