"""The Triton passes by themselves, under the interpreter: bf16 gradients over fp32 logits in place, many blocks.

Collected in any run, executed only with TRITON_INTERPRET=1 (test_triton starts such a run).
Legend: C rows, V vocab.
"""

import os

import pytest
import torch

from or1_kernels import rows

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("v", [7, 4096, 9001])
@pytest.mark.parametrize("transform", [rows.Transform(), rows.Transform(0.7, 5.0)], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_passes_match_fp64(v, transform, out_dtype):
    from or1_kernels.rows import triton_kernel as score_rows

    c, gen = 5, torch.Generator().manual_seed(0)
    logits = torch.randn(c, v, generator=gen) * 5
    targets = torch.tensor([0, v - 1, v // 2, 3, -1])
    inv_tau = torch.tensor([1.0, 2.0, 0.5, 1.3, 0.8])
    want = rows.row_sums(logits.double(), targets, inv_tau.double(), transform)
    got = score_rows.row_sums(logits, targets, inv_tau, transform)
    for name, a, b in zip(want._fields, got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")

    stats = rows.finish(want, inv_tau.double())
    stats = stats._replace(logp_C=torch.where(targets < 0, -1.0, stats.logp_C))
    slopes = (torch.linspace(-1, 2, c), torch.linspace(0.3, -0.1, c))
    exact = rows.row_grads_(
        logits.double(), targets, inv_tau.double(), transform, stats, tuple(s.double() for s in slopes)
    )
    single = rows.RowStats(*(x.float() for x in stats))
    mine = score_rows.row_grads_(logits, targets, inv_tau, transform, single, slopes, out_dtype=out_dtype)
    assert mine.dtype == out_dtype and mine.data_ptr() == logits.data_ptr()
    # The interpreter truncates to bf16 where a GPU rounds, hence 2^-7.
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2**-7}[out_dtype]
    torch.testing.assert_close(mine.double(), exact, rtol=tolerance, atol=1e-7)
