"""The policy loss inside Triton, under the interpreter: the twin of objective.py, both forms of a row, the whole head.

Executed only with TRITON_INTERPRET=1 (test_triton starts such a run).
Legend: C rows, V vocab.
"""

import itertools
import os

import pytest
import torch

from or1_kernels import PolicyObjective, rows, token_loss

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from or1_kernels.rows import triton_objective as own  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@triton.jit
def both_logarithms(x_N, out_2N, N: tl.constexpr):
    x = tl.load(x_N + tl.arange(0, N))
    tl.store(out_2N + tl.arange(0, N), own.log(1 + x))
    tl.store(out_2N + N + tl.arange(0, N), own.log1p(x))


C = 64
OBJECTIVES = [
    PolicyObjective(kind=kind, clip_low=low, clip_high=high, kl_coef=kl, is_cap=cap)
    for kind, (low, high), kl, cap in itertools.product(
        ("ppo_clip", "cispo"), ((0.2, 0.28), (1.0, 0.0)), (0.0, 0.05), (None, 1.1)
    )
]
OBJECTIVES += [
    PolicyObjective(is_cap=1.2, is_floor=0.9),
    PolicyObjective(is_cap=1.2, is_floor=0.9, is_mask=True),
    PolicyObjective(kind="cispo", kl_coef=0.05, is_cap=1.0, is_mask=True),
]


def draws(gen, *scales):
    return [torch.randn(C, generator=gen) * s for s in scales]


def draw_with(logits, targets, objective, *, one_sweep, inv_tau=None, transform=None, gen=None, old=True, out=None):
    """Run the pass and the same in fp64 with plain passes: (result, draw, fp64 stats, fp64 terms, fp64 draw)."""
    from or1_kernels.rows import triton_policy

    transform = transform or rows.Transform()
    inv_tau = torch.ones(len(logits)) if inv_tau is None else inv_tau
    wide = logits.double()
    stats = rows.finish(rows.row_sums(wide, targets, inv_tau.double(), transform), inv_tau.double())
    near = [(stats.logp_C + x[: len(logits)]).float() for x in draws(gen, 0.3, 0.3, 0.3)]
    advantages, weight = (x[: len(logits)] for x in draws(gen, 1.0, 1e-3))
    bonus = torch.zeros_like(weight) if one_sweep else weight * -0.1
    logs = {"old_logp_N": near[0] if old else None, "rollout_logp_N": near[1], "ref_logp_N": near[2]}
    exact = {k: None if x is None else x.double() for k, x in logs.items()}
    terms = token_loss(objective, stats.logp_C, advantages.double(), **exact)
    slopes = (weight.double() * terms.slope_N, bonus.double())
    want = rows.row_grads_(wide.clone(), targets, inv_tau.double(), transform, stats, slopes)
    constants = rows.TokenConstants(objective, one_sweep, advantages, weight, bonus, *logs.values())
    got = triton_policy.policy_rows_(logits, targets, inv_tau, transform, constants, out_dtype=out or torch.float32)
    draw = got.draw_CV.double()
    return got, draw if got.factor_C is None else draw * got.factor_C.double()[:, None], stats, terms, want


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_twin_is_the_objective(objective, old):
    """A row of two columns has any log-prob. Value, slope, ratio and clipped, of 64 random tokens."""
    gen = torch.Generator().manual_seed(OBJECTIVES.index(objective))
    logits = torch.randn(C, 2, generator=gen) * 3
    targets = torch.zeros(C, dtype=torch.int64)
    got, draw, stats, terms, want = draw_with(logits, targets, objective, one_sweep=True, gen=gen, old=old)
    torch.testing.assert_close(got.logp_C.double(), stats.logp_C, rtol=1e-6, atol=1e-12)
    # With z_y as the offset, the entropy of a nearly certain row is a difference of numbers as large as -logp.
    torch.testing.assert_close(got.entropy_C.double(), stats.entropy_C, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(got.ratio_C.double(), terms.ratio_N, rtol=3e-6, atol=0)
    torch.testing.assert_close(got.loss_C.double(), terms.loss_N, rtol=1e-5, atol=2e-6)
    assert torch.equal(got.clipped_C, terms.clipped_N)
    assert old or torch.equal(got.ratio_C, torch.ones(C))
    torch.testing.assert_close(draw, want, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(("kind", "is_mask"), [("ppo_clip", False), ("cispo", True)])
@pytest.mark.parametrize("field", ["advantages_C", "old_C", "rollout_C", "ref_C"])
def test_a_nan_constant_poisons_its_row_and_no_other(kind, is_mask, field):
    from or1_kernels.rows import triton_policy

    objective = PolicyObjective(kind=kind, kl_coef=0.1, is_cap=2.0, is_floor=0.5, is_mask=is_mask)
    given = dict.fromkeys(("advantages_C", "weight_C", "old_C", "rollout_C", "ref_C"))
    given = {name: torch.full((3,), -0.5) for name in given}
    given[field][1] = torch.nan
    constants = rows.TokenConstants(objective, True, bonus_C=torch.zeros(3), **given)
    one, zero = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    out = triton_policy.policy_rows_(torch.zeros(3, 5), zero, one, rows.Transform(), constants, out_dtype=torch.float32)
    assert out.loss_C.isnan().tolist() == out.factor_C.isnan().tolist() == [False, True, False]


def test_the_logarithms_are_exact_near_1_and_far_from_it():
    x = torch.cat([torch.logspace(-30, 37, 510), torch.tensor([0.0, torch.inf])])
    out = torch.empty(2, 512)
    both_logarithms[(1,)](x, out, N=512)
    torch.testing.assert_close(out[0].double(), (1 + x).double().log(), rtol=3e-7, atol=0)
    torch.testing.assert_close(out[1].double(), x.double().log1p(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("one_sweep", [True, False], ids=["one sweep", "two sweeps"])
@pytest.mark.parametrize("transform", [rows.Transform(), rows.Transform(0.7, 5.0)], ids=str)
@pytest.mark.parametrize(("v", "depth"), [(7, 0), (4096, 30), (9001, 0), (9001, 60), (9001, 100), (12288, 5000)])
def test_a_row_and_its_gradient_match_fp64(v, depth, transform, one_sweep):
    gen = torch.Generator().manual_seed(v + depth)
    logits, targets = torch.randn(6, v, generator=gen) * 4, torch.tensor([0, v - 1, v // 2, 3, 1, 2])
    logits[range(3), targets[:3]] -= depth
    # Of the fourth row only the last block is far above the target: blocks before it are written already.
    logits[3, 8192:] += depth
    inv_tau = torch.tensor([1.0, 2.0, 0.5, 1.3, 0.8, 1.0])
    objective = PolicyObjective(kl_coef=0.0, clip_high=0.28)
    got, draw, stats, _, want = draw_with(
        logits, targets, objective, one_sweep=one_sweep, inv_tau=inv_tau, transform=transform, gen=gen
    )
    torch.testing.assert_close(got.logp_C.double(), stats.logp_C, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.entropy_C.double(), stats.entropy_C, rtol=1e-5, atol=1e-5)
    scale = want.abs().amax(1, keepdim=True)
    # The ratio of a row takes the rounding of its log-prob, 2^-24 |logp|, and near a softcap 1 - u^2 cancels.
    limit = (2e-5 + 4e-7 * stats.logp_C.abs()[:, None]) * (1 if transform.softcap is None else 100)
    assert ((draw - want).abs() <= limit * scale).all()


@pytest.mark.parametrize("depth", [0, 60, 100])
def test_bf16_in_place_keeps_its_digits_when_a_row_is_redone(depth):
    """Blocks that are written already move by a power of two, so a redone row rounds each element once, as others."""
    gen = torch.Generator().manual_seed(depth)
    logits, targets = torch.randn(3, 20000, generator=gen) * 4, torch.tensor([5, 19999, 9000])
    logits[:2, 8192:] += depth
    address = logits.data_ptr()
    got, draw, _, _, want = draw_with(logits, targets, PolicyObjective(), one_sweep=True, gen=gen, out=torch.bfloat16)
    assert got.draw_CV.data_ptr() == address and got.draw_CV.stride() == (40000, 1)
    # The interpreter truncates to bf16 where a GPU rounds, hence 2^-7.
    torch.testing.assert_close(draw, want, rtol=2**-7 + 2e-4, atol=want.abs().max().item() * 1e-20)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 7, 4999])
@pytest.mark.parametrize("one_sweep", [True, False])
def test_a_bad_logit_poisons_its_row_or_has_probability_zero(one_sweep, column, bad):
    gen = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(4, 5000, generator=gen), torch.tensor([7, 8, 9, 10])
    logits[0, column] = bad
    clean = logits[1:].clone()
    got, draw, stats, _, want = draw_with(logits, targets, PolicyObjective(), one_sweep=one_sweep, gen=gen)
    torch.testing.assert_close(got.logp_C.double(), stats.logp_C, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(draw[1:], want[1:], rtol=2e-5, atol=1e-9)
    assert clean.isfinite().all()
    if bad == -torch.inf and column != 7:
        assert draw[0].isfinite().all() and draw[0, column] == 0
    elif bad != -torch.inf:
        assert got.logp_C[0].isnan() and draw[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("coef", [0.0, 0.01])
@pytest.mark.parametrize("objective", ["ppo", "ppo_kl_is", "cispo_kl"])
@pytest.mark.parametrize(("n", "h", "v"), [(37, 16, 101), (5, 8, 4100)])
def test_the_head_is_as_exact_as_plain_torch(kit, monkeypatch, n, h, v, objective, coef, dtype):
    from or1_kernels.rows import triton_policy

    asked = []
    inner = triton_policy.policy_rows_
    monkeypatch.setattr(triton_policy, "policy_rows_", lambda *a, **k: asked.append(a[4].one_sweep) or inner(*a, **k))
    case = kit.make_case(n, h, v, dtype=dtype, objective=kit.objectives[objective], entropy_coef=coef, softcap=9.0)
    mine = kit.policy(case, impl="triton", chunk_rows=16)
    assert asked and all(one is (coef == 0) for one in asked)
    kit.assert_as_exact(
        mine, kit.plain(case), kit.plain(case.to(torch.float64)), ("logp", "entropy", "dhidden", "dweight")
    )


def test_a_zero_bonus_in_a_tensor_is_not_asked_for_its_value(kit):
    case = kit.make_case(9, 8, 33, entropy_coef=0.0)
    one = kit.policy(case, impl="triton")
    two = kit.policy(case.with_options(entropy_coef=torch.zeros(())), impl="triton")
    for name in ("loss", "logp", "entropy", "dhidden", "dweight"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-5, atol=1e-7)
