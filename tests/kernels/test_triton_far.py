"""Rows of a fused GEMM that Triton computes again, under the interpreter (test_triton starts such a run)."""

import os

import pytest
import torch

from tests.helpers.exp_product import PlainExpGemm, statistics

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("wide", [False, True], ids=["contiguous", "view"])
def test_far_rows_are_computed_again_and_no_other(scale, wide):
    from or1_kernels.engine import exp_gemm
    from or1_kernels.rows import triton_far

    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 400, generator=gen).bfloat16()[:, :200] if wide else torch.randn(6, 200).bfloat16()
    weight = (torch.randn(160, 200, generator=gen) / 14).bfloat16()
    hidden[1] *= 40
    hidden[4] *= 90
    inv_tau, targets = torch.full((6,), 1.25), torch.randint(160, (6,), generator=gen)
    targets[1] = (weight.float() @ hidden[1].float()).argmin()
    rows = exp_gemm.ExpRows(hidden, targets, inv_tau * scale * exp_gemm.LOG2E, torch.zeros(6))
    far = exp_gemm.FarRows(
        torch.tensor([False, True, False, False, True, False]),
        torch.full((6, 160), 7.0, dtype=torch.bfloat16),
        *torch.full((3, 6), 5.0),
    )
    triton_far.redo(*rows[:3], weight, far)
    want = statistics(rows, weight, inv_tau * scale)
    norm = far.rest_C + far.d_C.exp()
    for i in range(6):
        if not far.far_C[i]:
            assert (far.e_CV[i] == 7).all() and far.d_C[i] == far.rest_C[i] == far.moment_C[i] == 5
            continue
        assert far.d_C[i] - norm[i].log() == pytest.approx(want.logp_C[i].item(), rel=1e-5)
        assert norm[i].log() - far.moment_C[i] / norm[i] == pytest.approx(want.entropy_C[i].item(), rel=1e-5, abs=1e-6)
        z = (weight.double() @ hidden[i].double()) * 1.25 * scale
        torch.testing.assert_close(far.e_CV[i].double(), (z - z.max()).exp(), rtol=2**-7, atol=1e-30)
    plain = far._replace(
        e_CV=far.e_CV.clone(), d_C=far.d_C.clone(), rest_C=far.rest_C.clone(), moment_C=far.moment_C.clone()
    )
    PlainExpGemm().redo(rows, weight, plain)
    for mine, other in zip(far[2:], plain[2:], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_nan_stays():
    from or1_kernels.engine import exp_gemm
    from or1_kernels.rows import triton_far

    hidden, weight = torch.ones(2, 8).bfloat16(), torch.ones(32, 8).bfloat16()
    hidden[1, 2] = torch.nan
    rows = exp_gemm.ExpRows(hidden, torch.zeros(2, dtype=torch.int64), torch.ones(2), torch.zeros(2))
    far = exp_gemm.FarRows(torch.ones(2, dtype=torch.bool), torch.zeros(2, 32).bfloat16(), *torch.zeros(3, 2))
    triton_far.redo(*rows[:3], weight, far)
    assert far.rest_C[0] == 31 and far.rest_C[1].isnan() and far.e_CV[1].isnan().all()
