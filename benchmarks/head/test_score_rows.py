"""The two row passes alone, over [rows, vocab] fp32 logits, beside plain torch.

Memory bandwidth is the bound: pass 1 reads a row once, pass 2 reads and writes the row.
"""

import pytest
import torch

from benchmarks.lib import measure
from or1_kernels.rows import Transform, finish, resolve

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, VOCAB = (4096, 152064) if DEVICE.type == "cuda" else (256, 32000)
IMPLS = ("triton", "torch") if DEVICE.type == "cuda" else ("native", "torch")


def inputs():
    """Return logits f32[C, V], targets i64[C] and 1 / temperature f32[C]."""
    gen = torch.Generator(device=DEVICE).manual_seed(0)
    logits = torch.randn(ROWS, VOCAB, generator=gen, device=DEVICE) * 4
    targets = torch.randint(0, VOCAB, (ROWS,), generator=gen, device=DEVICE)
    return logits, targets, torch.ones(ROWS, device=DEVICE)


@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("step", ["row_sums", "row_grads"])
@pytest.mark.parametrize("impl", IMPLS)
def test_score_rows(impl, step, softcap, benchmark, record):
    """Add one row of the table."""
    backend = resolve(impl, DEVICE, torch.float32)
    (logits, targets, inv_tau), transform = inputs(), Transform(1.0, softcap)
    stats = finish(backend.row_sums(logits, targets, inv_tau, transform), inv_tau)
    slopes = (torch.ones_like(inv_tau), torch.full_like(inv_tau, 0.01))
    scratch = logits.clone()

    def timed():
        if step == "row_sums":
            backend.row_sums(logits, targets, inv_tau, transform)
        else:
            backend.row_grads_(scratch, targets, inv_tau, transform, stats, slopes)
        measure.synchronize(DEVICE)

    def refill():
        # Pass 2 overwrites its input; gradients used as logits would have another distribution.
        scratch.copy_(logits)

    benchmark.pedantic(timed, setup=refill, rounds=10, warmup_rounds=2)
    seconds = benchmark.stats.stats.min
    moved = logits.numel() * 4 * (1 if step == "row_sums" else 2)
    benchmark.group = f"{step}, {'softcap' if softcap else 'plain'}"
    record(
        "score_rows",
        {
            "pass": step,
            "softcap": softcap or 0.0,
            "impl": impl,
            "rows": ROWS,
            "vocab": VOCAB,
            "ms": 1e3 * seconds,
            "GB/s": moved / seconds / 1e9,
        },
    )
