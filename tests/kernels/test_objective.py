"""The closed-form slope of every objective against autograd and finite differences; clip edges; input checks."""

import pytest
import torch

from or1_kernels import PolicyObjective, token_loss
from or1_kernels.objective import _SURROGATES, engine_weight
from tests.helpers.objectives import OBJECTIVES

GRID = OBJECTIVES | {
    "ppo_kl": PolicyObjective(kl_coef=0.1),
    "ppo_is": PolicyObjective(is_cap=1.1),
    "cispo_kl_is": PolicyObjective(kind="cispo", kl_coef=0.1, is_cap=2.0),
}
# A part of their ratio is detached, so the slope is no plain difference quotient.
DETACHED = {"cispo", "gspo"}


def test_every_kind_of_objective_is_tested():
    tested = {objective.kind for objective in OBJECTIVES.values()}
    assert tested == set(_SURROGATES), "add the kind to OBJECTIVES in tests/helpers/objectives.py"


def inputs(n=257):
    gen = torch.Generator().manual_seed(1)
    draw = lambda scale: torch.randn(n, generator=gen, dtype=torch.float64) * scale  # noqa: E731
    logp = -draw(2).abs()
    logs = {"old_logp_N": logp + draw(0.3), "rollout_logp_N": logp + draw(0.3), "ref_logp_N": logp + draw(0.3)}
    return logp, draw(1), logs | {"sequences_N": torch.arange(n) // 5}


@pytest.mark.parametrize("name", GRID)
def test_slope_is_what_autograd_gives(name):
    logp, advantages, logs = inputs()
    logp.requires_grad_()
    out = token_loss(GRID[name], logp, advantages, **logs)
    (grad,) = torch.autograd.grad(out.loss_N.sum(), logp)
    torch.testing.assert_close(out.slope_N, grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [n for n in GRID if GRID[n].kind not in DETACHED])
def test_slope_is_the_finite_difference(name):
    logp, advantages, logs = inputs()
    eps = 1e-6
    up, down = (token_loss(GRID[name], logp + s * eps, advantages, **logs).loss_N for s in (1, -1))
    torch.testing.assert_close(
        token_loss(GRID[name], logp, advantages, **logs).slope_N, (up - down) / (2 * eps), rtol=1e-6, atol=1e-8
    )


def test_cispo_slope_is_the_finite_difference_with_the_weight_held():
    logp, advantages, logs = inputs()
    objective, eps = PolicyObjective(kind="cispo", clip_low=0.2, clip_high=0.3), 1e-6
    held = (logp - logs["old_logp_N"]).exp().clamp(0.8, 1.3)
    difference = (-held * advantages * (logp + eps) + held * advantages * (logp - eps)) / (2 * eps)
    slope = token_loss(objective, logp, advantages, **logs).slope_N
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 3.0])
def test_clip_stops_only_the_side_that_would_go_further(advantage, ratio):
    out = token_loss(
        PolicyObjective(clip_low=0.2, clip_high=0.28),
        torch.tensor([ratio]).log().double(),
        torch.tensor([advantage]).double(),
        old_logp_N=torch.zeros(1).double(),
    )
    clipped = ratio > 1.28 if advantage > 0 else ratio < 0.8
    assert out.clipped_N.item() is clipped
    assert out.slope_N.item() == pytest.approx(0.0 if clipped else -advantage * ratio, rel=1e-6)


def test_on_policy_ratio_is_exactly_one_and_slope_minus_advantage():
    logp, advantages, _ = inputs()
    out = token_loss(PolicyObjective(), logp, advantages)
    assert torch.equal(out.ratio_N, torch.ones_like(logp))
    assert torch.equal(out.slope_N, -advantages)
    assert not out.clipped_N.any()


def test_importance_weight_is_truncated_at_the_cap():
    logp = torch.zeros(3, dtype=torch.float64)
    rollout = torch.tensor([0.0, -5.0, 1.0], dtype=torch.float64)
    out = token_loss(PolicyObjective(is_cap=2.0), logp, torch.ones(3).double(), rollout_logp_N=rollout)
    torch.testing.assert_close(-out.slope_N, torch.tensor([1.0, 2.0, torch.e**-1], dtype=torch.float64))


# rho = 1/4, 1, 2, 3. TIS moves a weight to the bound, MIS and IcePop drop the token.
@pytest.mark.parametrize(
    ("objective", "weights"),
    [
        (PolicyObjective(is_cap=2.0), [0.25, 1, 2, 2]),
        (PolicyObjective(is_cap=2.0, is_floor=0.5), [0.5, 1, 2, 2]),
        (PolicyObjective(is_cap=2.0, is_mask=True), [0.25, 1, 2, 0]),
        (PolicyObjective(is_cap=2.5, is_floor=0.5, is_mask=True), [0, 1, 2, 0]),
        (PolicyObjective(kind="cispo", is_cap=torch.inf, is_floor=0.5, is_mask=True), [0, 1, 2, 3]),
    ],
    ids=["TIS", "TIS, both bounds", "MIS", "IcePop", "no upper bound"],
)
def test_importance_weights_by_hand(objective, weights):
    rho = torch.tensor([0.25, 1.0, 2.0, 3.0, torch.nan], dtype=torch.float64)
    logp, zero = torch.zeros(5, dtype=torch.float64, requires_grad=True), torch.zeros(5, dtype=torch.float64)
    out = token_loss(objective, logp, torch.full_like(zero, -2.0), old_logp_N=zero, rollout_logp_N=-rho.log())
    assert engine_weight(objective, zero, -rho.log())[:4].tolist() == pytest.approx(weights, rel=1e-12)
    assert out.slope_N[:4].tolist() == pytest.approx([2 * w for w in weights], rel=1e-12)
    assert out.slope_N[4].isnan() and out.loss_N[4].isnan()
    (grad,) = torch.autograd.grad(out.loss_N[:4].sum(), logp)
    torch.testing.assert_close(grad[:4], out.slope_N[:4])


def test_gspo_is_the_papers_clipped_sequence_ratio():
    """Eq. 5: J = 1/G sum_i min(s_i A_i, clip(s_i) A_i), s_i = exp(mean of lp - old over y_i), by plain autograd.

    Lengths 1 to 7. Both signs of A, ratios inside and outside of the clip; the fifth sequence has a row that is masked.
    """
    gen = torch.Generator().manual_seed(5)
    numbers = torch.arange(7).repeat_interleave(torch.arange(7) + 1)
    logp = -torch.rand(28, generator=gen, dtype=torch.float64).requires_grad_()
    old = logp.detach() + 0.1 * torch.randn(28, generator=gen, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1, 2, -2, 1, 1, -1], dtype=torch.float64)
    masked = torch.arange(28) == 12
    parts, clipped = [], []
    for i in range(7):
        mine = (numbers == i) & ~masked
        s = (logp - old)[mine].mean().exp()
        parts.append(torch.min(s * advantages[i], s.clamp(0.97, 1.02) * advantages[i]))
        clipped += [bool(s > 1.02 if advantages[i] > 0 else s < 0.97)] * int((numbers == i).sum())
    (want,) = torch.autograd.grad(-torch.stack(parts).mean(), logp)

    objective = PolicyObjective(kind="gspo", clip_low=0.03, clip_high=0.02)
    given = {"old_logp_N": old, "sequences_N": torch.where(masked, -1, numbers)}
    out = token_loss(objective, logp, advantages[numbers], **given)
    counts = torch.bincount(numbers[~masked])
    weight = torch.where(masked, 0.0, 1 / counts[numbers].double() / 7)
    (grad,) = torch.autograd.grad((weight * out.loss_N).sum(), logp)
    torch.testing.assert_close((weight * out.loss_N).sum(), -torch.stack(parts).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(weight * out.slope_N, want, rtol=1e-12, atol=1e-15)
    assert out.clipped_N[~masked].tolist() == [c for c, m in zip(clipped, masked.tolist(), strict=True) if not m]
    assert 0 < sum(clipped) < 28


def test_gspo_without_old_log_probs_is_the_token_form():
    logp, advantages, _ = inputs()
    gspo, ppo = (token_loss(PolicyObjective(kind=kind), logp, advantages) for kind in ("gspo", "ppo_clip"))
    assert all(torch.equal(a, b) for a, b in zip(gspo, ppo, strict=True))
    with pytest.raises(ValueError, match="sequences is missing"):
        token_loss(PolicyObjective(kind="gspo"), logp, advantages, old_logp_N=logp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_bounded_whatever_the_reference_says(dtype):
    """ref - lp = 2: k3 = e^2 - 3. Beyond 10, at e^3 - 4 = 16 and at 11 + e^-12, the bound and no slope, never inf."""
    gap = torch.tensor([2.0, 3.0, 39.0, 89.0, 1e6, -5.0, -12.0, -1e6], dtype=dtype)
    logp = torch.zeros(8, dtype=dtype, requires_grad=True)
    out = token_loss(PolicyObjective(kl_coef=1.0), logp, torch.zeros(8, dtype=dtype), ref_logp_N=gap)
    e2, e5 = torch.e**2, torch.e**-5
    assert out.loss_N.tolist() == pytest.approx([e2 - 3, 10, 10, 10, 10, e5 + 4, 10, 10], rel=1e-6)
    assert out.slope_N.tolist() == pytest.approx([1 - e2, 0, 0, 0, 0, 1 - e5, 0, 0], rel=1e-6)
    (grad,) = torch.autograd.grad(out.loss_N.sum(), logp)
    torch.testing.assert_close(grad, out.slope_N)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"kind": "dpo"}, "kind"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"kl_coef": float("nan")}, "kl_coef"),
        ({"is_cap": 0.0}, "is_cap"),
        ({"is_floor": 0.5}, "is_floor"),
        ({"is_mask": True}, "is_mask"),
        ({"is_cap": 1.0, "is_floor": 1.5}, "is_floor"),
    ],
)
def test_bad_constants_are_refused_by_name(fields, word):
    with pytest.raises(ValueError, match=word):
        PolicyObjective(**fields)


@pytest.mark.parametrize(("fields", "word"), [({"is_cap": 2.0}, "rollout_logp"), ({"kl_coef": 0.1}, "ref_logp")])
def test_a_missing_log_prob_is_named(fields, word):
    with pytest.raises(ValueError, match=f"{word} is missing"):
        token_loss(PolicyObjective(**fields), torch.zeros(2), torch.ones(2))
