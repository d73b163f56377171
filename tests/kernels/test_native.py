"""The native passes: every instruction set, any thread count, row tails, accuracy of their exp, refused arguments.

Legend: C rows, V vocab.
"""

import numpy as np
import pytest
import torch

from or1_kernels import rows

native = pytest.importorskip("or1_kernels._native", reason="extension not built")


def block(c=9, v=2085, seed=0, scale=6.0):
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(c, v, generator=gen) * scale
    targets = torch.randint(0, v, (c,), generator=gen)
    targets[0], targets[-1] = v - 1, -1
    return logits, targets, torch.rand(c, generator=gen) + 0.5


def sums(logits, targets, inv_tau, transform, **kw):
    kw = {"threads": 2} | kw
    out = native.row_sums(
        logits.numpy(), targets.numpy(), inv_tau.numpy(), transform.scale, transform.softcap or 0.0, **kw
    )
    return rows.RowSums(*torch.from_numpy(out))


@pytest.mark.parametrize("transform", [rows.Transform(), rows.Transform(0.5, 4.0)], ids=str)
@pytest.mark.parametrize("v", [1, 3, 16, 17, 1024, 2085])
@pytest.mark.parametrize("isa", native.row_isas())
def test_every_instruction_set_matches_fp64(isa, v, transform):
    logits, targets, inv_tau = block(v=v)
    want = rows.row_sums(logits.double(), targets, inv_tau.double(), transform)
    got = sums(logits, targets, inv_tau, transform, isa=isa)
    for name, a, b in zip(want._fields, got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    stats = rows.finish(want, inv_tau.double())
    stats = stats._replace(logp_C=torch.where(targets < 0, -1.0, stats.logp_C))
    slopes = (torch.linspace(-1, 2, 9), torch.linspace(0.3, -0.1, 9))
    exact = tuple(s.double() for s in slopes)
    truth = rows.row_grads_(logits.double(), targets, inv_tau.double(), transform, stats, exact)
    mine = logits.clone()
    native.row_grads(
        mine.numpy(),
        targets.numpy(),
        inv_tau.numpy(),
        transform.scale,
        transform.softcap or 0.0,
        torch.stack(stats).float().numpy(),
        torch.stack(slopes).numpy(),
        threads=2,
        isa=isa,
    )
    torch.testing.assert_close(mine.double(), truth, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("transform", [rows.Transform(), rows.Transform(0.5, 4.0)], ids=str)
@pytest.mark.parametrize("v", [1, 3, 16, 17, 1024, 2085])
@pytest.mark.parametrize("isa", native.row_isas())
def test_bf16_gradients_are_the_fp32_ones_rounded(isa, v, transform):
    logits, targets, inv_tau = block(v=v)
    logits[2, v // 2], logits[3, v // 3] = torch.nan, -torch.inf
    stats = torch.stack(rows.finish(rows.row_sums(logits, targets, inv_tau, transform), inv_tau))
    # Row 4 has denormal gradients, row 5 a target of probability 1.
    slopes = torch.stack([torch.linspace(-1, 2, 9), torch.linspace(0.3, -0.1, 9)])
    slopes[:, 4] *= 1e-38
    stats[0, 5] = 0.0
    wide, half = (torch.full((9, v + 7), 3.0)[:, :v].copy_(logits) for _ in range(2))
    for x, bf16 in ((wide, False), (half, True)):
        arrays = (x.numpy(), targets.numpy(), inv_tau.numpy(), transform.scale, transform.softcap or 0.0)
        native.row_grads(*arrays, stats.numpy(), slopes.numpy(), threads=2, isa=isa, bf16=bf16)
    got, want = half.view(torch.bfloat16)[:, :v], wide.to(torch.bfloat16)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0, torch.inf, -torch.inf), want.nan_to_num(0.0, torch.inf, -torch.inf))
    assert (half.as_strided((9, 7), (v + 7, 1), v) == 3).all()


@pytest.mark.parametrize("isa", native.row_isas())
def test_exp_is_within_two_ulp_and_flushes_only_below_the_normal_range(isa):
    # Rows [0, x] with target 0: rest is exp(x).
    x = torch.cat([-torch.logspace(-6, 1.94, 4000), torch.tensor([-87.0, -88.0, -104.0, -1e5, -torch.inf])])
    logits = torch.stack([torch.zeros_like(x), x], 1).contiguous()
    got = sums(logits, torch.zeros(len(x), dtype=torch.int64), torch.ones(len(x)), rows.Transform(), isa=isa).rest_C
    want = x.double().exp()
    normal = want > 1.2e-38
    assert ((got.double() - want).abs()[normal] <= 2 * 2**-23 * want[normal]).all()
    assert not got[~normal].any()


def test_thread_count_and_neighbours_do_not_change_a_bit():
    logits, targets, inv_tau = block(c=64, v=5003)
    alone = [sums(logits[i : i + 1], targets[i : i + 1], inv_tau[i : i + 1], rows.Transform()) for i in range(64)]
    for threads in (1, 2, 7):
        whole = sums(logits, targets, inv_tau, rows.Transform(), threads=threads)
        for field, parts in zip(whole, zip(*alone, strict=True), strict=True):
            assert torch.equal(field, torch.cat(parts))


def test_rows_may_be_strided():
    logits, targets, inv_tau = block(c=6, v=40)
    wide = torch.full((6, 64), torch.nan)
    wide[:, :40] = logits
    a, b = sums(wide[:, :40], targets, inv_tau, rows.Transform()), sums(logits, targets, inv_tau, rows.Transform())
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"targets": np.array([0, 7])}, r"targets\[1\] is 7"),
        ({"targets": np.array([0])}, "targets must"),
        ({"inv_tau": np.ones(4, np.float32)[::2]}, "inv_tau must"),
        ({"isa": "sse9"}, "sse9"),
        ({"logits": np.zeros((7, 2), np.float32).T}, "adjacent columns"),
    ],
)
def test_bad_arrays_are_refused_by_name(change, word):
    good = {
        "logits": np.zeros((2, 7), np.float32),
        "targets": np.array([0, 1]),
        "inv_tau": np.ones(2, np.float32),
        "scale": 1.0,
        "softcap": 0.0,
        "threads": 1,
    }
    with pytest.raises(ValueError, match=word):
        native.row_sums(**(good | change))
