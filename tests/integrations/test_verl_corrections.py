"""or1's weights, masks and baselines are those of verl's rollout correction and advantage estimators."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from or1.config.loss import MismatchConfig
from or1.magic.baselines import advantages
from or1.magic.mismatch import sequence_weight
from or1_kernels import PolicyObjective
from or1_kernels.objective import engine_weight

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
correction = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
pytestmark = pytest.mark.integrations

B, C = 12, 9
LENGTHS_B = torch.randint(1, C + 1, (B,), generator=torch.Generator().manual_seed(0))
MASK_BC = (torch.arange(C) < LENGTHS_B[:, None]).double()
DRIFT_BC = 0.3 * torch.randn(B, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("objective", "threshold"),
    [(PolicyObjective(is_cap=1.2), 1.2), (PolicyObjective(is_cap=1.2, is_floor=0.9, is_mask=True), "0.9_1.2")],
    ids=["TIS", "IcePop"],
)
def test_weights_of_tokens(objective: PolicyObjective, threshold: float | str) -> None:
    want, _ = correction.compute_rollout_correction_weights(DRIFT_BC, MASK_BC, "token", threshold)
    got = engine_weight(objective, DRIFT_BC, torch.zeros_like(DRIFT_BC)) * MASK_BC
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("kind", "lower", "upper", "threshold"),
    [("sequence_tis", None, 1.5, 1.5), ("sequence_mis", 0.7, 1.5, "0.7_1.5"), ("geometric", 0.9, 1.1, None)],
)
def test_weights_of_responses(kind: str, lower: float | None, upper: float, threshold: float | str | None) -> None:
    mismatch = MismatchConfig.model_validate({"kind": kind, "lower": lower, "upper": upper})
    drifts = [row[: int(n)].numpy() for row, n in zip(DRIFT_BC, LENGTHS_B, strict=True)]
    got = np.array([sequence_weight(drift, mismatch) for drift in drifts])
    if threshold is None:
        # verl bounds the inverse of the ratio.
        bounds = f"{1 / upper}_{1 / lower}"
        want_BC, _ = correction.compute_rollout_rejection_mask(DRIFT_BC, MASK_BC, "seq_mean_k1", bounds)
    else:
        want_BC, _ = correction.compute_rollout_correction_weights(DRIFT_BC, MASK_BC, "sequence", threshold)
    np.testing.assert_allclose(got, want_BC[:, 0].numpy(), rtol=1e-9)
    assert len(set(got)) > 1 and (kind == "sequence_tis" or 0 < (got == 0).mean() < 1)


def test_baselines() -> None:
    """One token a response, since verl whitens over tokens and or1 over responses."""
    rewards = np.random.default_rng(3).normal(size=(3, 4))
    token_B1, ones_B1 = torch.tensor(rewards.reshape(-1, 1)), torch.ones(12, 1, dtype=torch.float64)
    index_B = np.repeat(np.arange(3), 4)
    rloo, _ = core_algos.compute_rloo_outcome_advantage(token_B1.clone(), ones_B1, index_B)
    baseline, _ = core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(token_B1.clone(), ones_B1, index_B)
    gamma = SimpleNamespace(gamma=1.0)
    plain, _ = core_algos.compute_reinforce_plus_plus_outcome_advantage(token_B1.clone(), ones_B1, config=gamma)
    for kind, want_B1 in (("rloo", rloo), ("reinforce_pp_baseline", baseline), ("reinforce_pp", plain)):
        np.testing.assert_allclose(advantages(rewards, kind).ravel(), want_B1[:, 0].numpy(), rtol=1e-5, atol=1e-7)
    assert math.isclose(float(plain.mean()), 0, abs_tol=1e-6)
