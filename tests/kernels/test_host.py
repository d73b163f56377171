"""The CPU's own parts of the engine: bf16 products with an fp32 result, huge pages, scaling of gradients.

Legend: M, N, K sizes of a product.
"""

import pytest
import torch

from or1_kernels import linear_logprob_entropy
from or1_kernels.engine import gemms, host
from or1_kernels.engine.host import scaled

needs_product = pytest.mark.skipif(not host.has_wide_product(), reason="no AMX, or a torch without MKL")


@pytest.fixture
def wide(monkeypatch):
    """Take the AMX path for any size."""
    monkeypatch.setattr(gemms, "choose", lambda weight, num_rows: gemms.HostWideOut())


def factors(m, n, k, seed=0):
    """Return bf16 [M, K] and [K, N], views of wider rows with NaN behind them; the second one transposed."""
    gen = torch.Generator().manual_seed(seed)
    left = torch.full((m, k + 40), torch.nan, dtype=torch.bfloat16)[:, :k]
    right = torch.full((n, k + 5), torch.nan, dtype=torch.bfloat16)[:, :k]
    return left.copy_(torch.randn(m, k, generator=gen)), right.copy_(torch.randn(n, k, generator=gen)).T


@needs_product
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 33, 7), (5, 1031, 31), (129, 65, 257), (64, 3000, 100)])
def test_the_product_is_as_exact_as_fp32_and_reads_nothing_behind_rows(m, n, k, beta):
    left, right = factors(m, n, k)
    wide = torch.full((m, n + 3), torch.nan)
    out = wide[:, :n]
    if beta:
        out.copy_(torch.randn(m, n, generator=torch.Generator().manual_seed(1)))
    start = out.clone() if beta else torch.zeros(m, n)
    host.add_product(out, left, right, beta)
    want = left.double() @ right.double() + start.double()
    peer = (left.float() @ right.float() + start - want).abs().max()
    assert (out - want).abs().max() <= 2 * peer + 2 * torch.finfo(torch.float32).eps * want.abs().max()
    assert wide[:, n:].isnan().all()


@needs_product
def test_a_transposed_left_factor_and_any_other_stride():
    left, right = factors(70, 40, 90)
    want = left.double() @ right.double()
    for a, b in (
        (left.T.contiguous().T, right),
        (left, right.contiguous()),
        (left.repeat_interleave(2, 1)[:, ::2], right),
    ):
        out = torch.empty(70, 40)
        host.add_product(out, a, b, 0.0)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@needs_product
def test_denormals_infinities_and_an_empty_sum():
    left, right = torch.zeros(4, 32, dtype=torch.bfloat16), torch.ones(32, 3, dtype=torch.bfloat16)
    left[0], left[1, 3], left[2, 4], left[3, 5] = 1e-40, torch.inf, -torch.inf, torch.nan
    out = torch.empty(4, 3)
    host.add_product(out, left, right, 0.0)
    # The instruction may read denormals as zero.
    assert out[0].abs().max() <= 32e-40
    assert (out[1] == torch.inf).all() and (out[2] == -torch.inf).all() and out[3].isnan().all()
    host.add_product(out, left[:, :0], right[:0], 0.0)
    host.add_product(out[:0], left[:0], right, 0.0)


def test_unfit_arguments_are_named():
    left, right = factors(4, 5, 6)
    with pytest.raises(ValueError, match=r"\(4, 6\) is not"):
        host.add_product(torch.empty(4, 6), left, right, 0.0)
    with pytest.raises(TypeError, match="float16"):
        host.add_product(torch.empty(4, 5), left.half(), right, 0.0)
    with pytest.raises(ValueError, match="adjacent"):
        host.add_product(torch.empty(5, 4).T, left, right, 0.0)


def test_the_product_can_be_forbidden(monkeypatch):
    monkeypatch.setattr(gemms, "_has_bf16_cpu", lambda: True)
    monkeypatch.setenv(host.FORBID, "1")
    assert not host.has_wide_product()
    big = torch.empty(1 << 15, 1 << 10, dtype=torch.bfloat16, device="meta")
    assert gemms.choose(big, 64) == gemms.Residual()


@needs_product
@pytest.mark.parametrize("preset", ["fast", "lean"])
@pytest.mark.parametrize(("n", "h", "v"), [(1, 33, 7), (200, 64, 1031), (65, 31, 515)])
def test_the_head_is_as_exact_as_plain_torch(kit, impl, wide, n, h, v, preset):
    case = kit.make_case(n, h, v, dtype=torch.bfloat16, seed=n)
    mine = kit.policy(case, impl=impl, chunk_rows=64, preset=preset)
    truth = kit.plain(case.to(torch.float64))
    kit.assert_as_exact(mine, kit.plain(case), truth)
    assert (mine.logp.double() - truth.logp).abs().max() < 3e-5


@needs_product
def test_scores_repeat_bit_by_bit_and_the_stash_changes_nothing(kit, impl, wide):
    case = kit.make_case(90, 33, 515, dtype=torch.bfloat16)
    upstream = (torch.linspace(-1, 1, 90), torch.linspace(1, 0, 90))
    first = kit.score(case, upstream, impl=impl, chunk_rows=32)
    for options in ({}, {"stash_bytes": 4 * 90 * 515}):
        again = kit.score(case, upstream, impl=impl, chunk_rows=32, **options)
        for name in ("logp", "entropy", "dhidden", "dweight"):
            assert torch.equal(getattr(first, name), getattr(again, name)), name


@needs_product
def test_a_forbidden_token_has_a_logit_of_minus_infinity(kit, impl, wide):
    case = kit.make_case(20, 32, 131, dtype=torch.bfloat16)
    bias = torch.zeros(131, dtype=torch.bfloat16)
    forbidden = (case.targets[0] + 1) % 131
    bias[forbidden] = -torch.inf
    keep = case.targets != forbidden
    hidden = case.hidden.clone().requires_grad_()
    logp, entropy = linear_logprob_entropy(hidden, case.weight, case.targets, bias=bias, impl=impl)
    want = (case.hidden.double() @ case.weight.double().T + bias.double()).log_softmax(1)
    own = want.gather(1, case.targets[:, None])[:, 0]
    torch.testing.assert_close(logp[keep].double(), own[keep], rtol=1e-5, atol=1e-5)
    (logp[keep].sum() + entropy.sum()).backward()
    assert entropy.isfinite().all() and hidden.grad.isfinite().all()


def test_large_memory_is_like_small_memory():
    for shape in ((3, 5), (33 << 10, 1 << 9), (0, 4)):
        out = host.zeros(shape, torch.float32, torch.device("cpu"))
        assert out.shape == shape and out.is_contiguous() and not out.any()
        out.fill_(1)
        assert out.sum(dtype=torch.float64) == out.numel()


def test_a_buffer_is_kept_for_the_next_call_and_no_other():
    host.free_spare()
    like = torch.zeros(1)
    first = host.borrow(like, (3 << 10, 4 << 10), torch.float32)
    address = first.data_ptr()
    host.give_back(first)
    second = host.borrow(like, (5, 7), torch.float32)
    third = host.borrow(like, (3 << 10, 4 << 10), torch.float32)
    assert second.data_ptr() == address and second.is_contiguous() and third.data_ptr() != address
    for unfit in (torch.zeros(4, 4), torch.zeros(3 << 10, 4 << 10, dtype=torch.float64)):
        host.give_back(unfit)
        assert host.borrow(like, (4, 4), torch.float32).data_ptr() != unfit.data_ptr()
    with torch.inference_mode():
        host.give_back(host.borrow(like, (3 << 10, 4 << 10), torch.float32))
    host.borrow(like, (3 << 10, 4 << 10), torch.float32).zero_()


@pytest.mark.parametrize(
    "chosen", [gemms.Upcast(torch.float32), pytest.param(gemms.HostWideOut(), marks=needs_product)]
)
def test_the_first_chunk_overwrites_any_old_weight_gradient(chosen):
    draw, hidden = torch.randn(40, 96).to(chosen.operand), torch.randn(40, 32).to(chosen.operand)
    for dtype in {torch.float32, chosen.operand}:
        set_, added = torch.full((96, 32), torch.nan, dtype=dtype), torch.zeros(96, 32, dtype=dtype)
        chosen.set_dweight(draw, hidden, set_)
        chosen.add_dweight(draw, hidden, added)
        assert torch.equal(set_, added)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_scaled_and_a_kept_graph_keeps_them(monkeypatch, dtype, factor, kept):
    monkeypatch.setattr("or1_kernels.engine.host._graph_is_kept", lambda: kept)
    grad = torch.randn(5, 7)
    before = grad.clone()
    out = scaled(grad, torch.tensor(factor), dtype)
    assert torch.equal(out, (before * factor).to(dtype))
    if kept:
        out.zero_()
        assert torch.equal(grad, before)
