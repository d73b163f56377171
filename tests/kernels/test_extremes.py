"""Logits at the edges of fp32: certainty, impossibility, a large common offset, infinities and nans."""

import pytest
import torch

from or1_kernels import linear_logprob_entropy


def scored(logits, targets, impl, upstream=(1.0, 0.5)):
    """Score given fp32 logits exactly: hidden is the identity, weight their transpose. Returns logp, H, dlogits."""
    n = logits.shape[0]
    weight = logits.T.contiguous().requires_grad_()
    logp, entropy = linear_logprob_entropy(torch.eye(n, dtype=logits.dtype), weight, targets, impl=impl)
    (upstream[0] * logp + upstream[1] * entropy).sum().backward()
    return logp.detach(), entropy.detach(), weight.grad.T


def against_fp64(logits, targets, impl, **kw):
    return scored(logits, targets, impl, **kw), scored(logits.double(), targets, "reference", **kw)


def test_a_nearly_certain_target_keeps_its_digits(impl):
    # The rest of the row sums to 1e-7, which 1 - p_y in fp32 rounds to 1.2e-7 or 0.
    gap = torch.tensor([5.0, 16.0, 20.0, 25.0])
    logits = torch.zeros(4, 1000)
    logits[:, 17] = gap + torch.tensor(999.0).log()
    logp, _, grad = scored(logits, torch.full((4,), 17), impl, upstream=(1.0, 0.0))
    # log_softmax in fp64 loses these digits too; the ratio form does not.
    odds = 999 * (-logits[:, 17].double()).exp()
    torch.testing.assert_close(logp.double(), -odds.log1p(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[:, 17].double(), odds / (1 + odds), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[:, 17], -torch.cat([grad[:, :17], grad[:, 18:]], 1).sum(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("depth", [30.0, 79.0, 81.0, 95.0, 200.0, 5000.0])
def test_an_impossible_target_is_scored_not_clamped(impl, depth):
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=gen)
    logits[:, 4] -= depth
    (logp, entropy, grad), (want, want_h, want_grad) = against_fp64(logits, torch.full((6,), 4), impl)
    assert (want < -depth + 5).all()
    torch.testing.assert_close(logp.double(), want, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), want_h, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_changes_nothing(impl, offset):
    # Multiples of 2^-8 below 8 stay exact after adding 1e4, so any difference is the algorithm's.
    gen = torch.Generator().manual_seed(0)
    logits = torch.randint(-2000, 2000, (8, 400), generator=gen) / 256.0
    targets = torch.randint(0, 400, (8,), generator=gen)
    shifted, base = scored(logits + offset, targets, impl), scored(logits, targets, impl)
    for a, b in zip(shifted, base, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_masked_column_has_probability_zero_and_no_nan(impl):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    bias = torch.zeros(40)
    bias[[3, 39]] = -torch.inf
    weight = logits.T.contiguous().requires_grad_()
    targets = torch.tensor([0, 1, 2, 4, 5])
    logp, entropy = linear_logprob_entropy(torch.eye(5), weight, targets, bias=bias, impl=impl)
    (logp + entropy).sum().backward()
    kept = [v for v in range(40) if v not in (3, 39)]
    want = logits[:, kept].log_softmax(-1)
    torch.testing.assert_close(entropy, -(want.exp() * want).sum(-1))
    assert weight.grad.isfinite().all() and not weight.grad[[3, 39]].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_logit_poisons_its_row_and_no_other(impl, bad):
    logits = torch.randn(4, 33, generator=torch.Generator().manual_seed(1))
    clean = scored(logits, torch.arange(4), impl)
    logp, entropy = linear_logprob_entropy(
        torch.cat([torch.eye(4), torch.tensor([[bad, 0, 0, 0]])]), logits.T.contiguous(), torch.arange(5), impl=impl
    )
    assert logp[4].isnan() and entropy[4].isnan()
    torch.testing.assert_close(logp[:4], clean[0])


def test_two_equal_maxima_and_a_flat_row(impl):
    logits = torch.zeros(2, 64)
    logits[1, :2] = 60.0
    logp, entropy, _ = scored(logits, torch.tensor([5, 0]), impl)
    torch.testing.assert_close(entropy, torch.tensor([64.0, 2.0]).log())
    torch.testing.assert_close(logp, -torch.tensor([64.0, 2.0]).log())
