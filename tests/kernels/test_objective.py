"""The closed-form slope of every objective against autograd and finite differences; clip edges; input checks."""

import pytest
import torch

from or1_kernels import PolicyObjective, token_loss
from or1_kernels.objective import _SURROGATES
from tests.helpers.objectives import OBJECTIVES

GRID = OBJECTIVES | {
    "ppo_kl": PolicyObjective(kl_coef=0.1),
    "ppo_is": PolicyObjective(is_cap=1.1),
    "cispo_kl_is": PolicyObjective(kind="cispo", kl_coef=0.1, is_cap=2.0),
}
# Their weight is detached, so the slope is no plain difference quotient.
DETACHED = {"cispo"}


def test_every_kind_of_objective_is_tested():
    tested = {objective.kind for objective in OBJECTIVES.values()}
    assert tested == set(_SURROGATES), "add the kind to OBJECTIVES in tests/helpers/objectives.py"


def inputs(n=257):
    gen = torch.Generator().manual_seed(1)
    draw = lambda scale: torch.randn(n, generator=gen, dtype=torch.float64) * scale  # noqa: E731
    logp = -draw(2).abs()
    logs = {"old_logp_N": logp + draw(0.3), "rollout_logp_N": logp + draw(0.3), "ref_logp_N": logp + draw(0.3)}
    return logp, draw(1), logs


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
    ],
)
def test_bad_constants_are_refused_by_name(fields, word):
    with pytest.raises(ValueError, match=word):
        PolicyObjective(**fields)


@pytest.mark.parametrize(("fields", "word"), [({"is_cap": 2.0}, "rollout_logp"), ({"kl_coef": 0.1}, "ref_logp")])
def test_a_missing_log_prob_is_named(fields, word):
    with pytest.raises(ValueError, match=f"{word} is missing"):
        token_loss(PolicyObjective(**fields), torch.zeros(2), torch.ones(2))
