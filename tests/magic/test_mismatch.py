"""Weights and masks for an engine that is not the trainer, by hand: the functions, and a step that uses them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import or1.trainer
from or1.config.loss import MismatchConfig
from or1.core.types import TrainSequence
from or1.magic.mismatch import geometric_mask, geometric_ratio, masked, product_ratio, sequence_weight, truncated, weigh
from tests.helpers.hand_run import ONE, ZERO, config_of, group, learn, response, trainer_of

# Advantage of one right and one wrong response, up to eps.
A = 1 / math.sqrt(2)


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-4, abs=1e-9)


def test_ratios_of_a_response_are_the_product_and_its_root() -> None:
    """rho = 2, 1/2, 4, 4: product 16, fourth root 2. One token more at rho = 1 leaves the product."""
    drift = np.log([2, 0.5, 4, 4])
    assert product_ratio(drift) == pytest.approx(16) and geometric_ratio(drift) == pytest.approx(2)
    assert product_ratio(np.append(drift, 0)) == pytest.approx(16)
    assert geometric_ratio(np.append(drift, 0)) == pytest.approx(16**0.2)
    assert product_ratio(np.empty(0)) == geometric_ratio(np.empty(0)) == 1.0
    assert math.isfinite(product_ratio(np.full(1000, 50.0))) and product_ratio(np.full(1000, -50.0)) > 0


def test_a_bound_truncates_or_masks_and_belongs_to_the_range() -> None:
    assert [truncated(r, 0.5, 2.0) for r in (0.4, 0.5, 1.5, 2.0, 3.0)] == [0.5, 0.5, 1.5, 2.0, 2.0]
    assert [masked(r, 0.5, 2.0) for r in (0.4, 0.5, 1.5, 2.0, 3.0)] == [0.0, 0.5, 1.5, 2.0, 0.0]
    assert [truncated(9.0, 0.5, None), truncated(0.1, None, 2.0), truncated(9.0, None, None)] == [9.0, 0.1, 9.0]
    assert [masked(9.0, 0.5, None), masked(0.1, None, 2.0)] == [9.0, 0.1]
    drift = np.log([2, 0.5, 4, 4])
    assert [geometric_mask(drift, *bounds) for bounds in ((1.0, 2.1), (1.0, 1.9), (2.1, 3.0))] == [1.0, 0.0, 0.0]
    assert math.isnan(geometric_mask(np.array([math.nan]), 0.9, 1.1)) and math.isnan(masked(math.nan, 0.9, 1.1))
    with pytest.raises(ValueError, match="weighs tokens"):
        sequence_weight(drift, MismatchConfig(kind="icepop"))


def test_tokens_without_an_engines_log_prob_have_no_say() -> None:
    ids = np.zeros(3, np.int32)
    rollout = np.log(np.array([0.5, math.nan, 0.25], np.float32))
    old = np.log(np.array([0.75, 1e-9, 0.5]))
    (found,) = weigh([TrainSequence(ids, ids, rollout, 2.0, old)], MismatchConfig(kind="sequence_mis", upper=4.0))
    assert found.weight == pytest.approx(3, rel=1e-6) and found.advantage == pytest.approx(6, rel=1e-6)
    with pytest.raises(ValueError, match="no old_logp"):
        weigh([TrainSequence(ids, ids, rollout, 2.0)], MismatchConfig(kind="geometric"))


# One response of two tokens, which the engine sampled with 1/3 each and the policy gives 1/2: rho 3/2 a token, product
# 9/4, geometric mean 3/2. The other has the policy's own 1/4. On-policy the loss is -(w A - A) / 2.
STEPS = [
    ({"is_cap": 1.25}, 1.25, None, None),
    ({"mismatch": {"kind": "tis", "upper": 1.25}}, 1.25, None, None),
    ({"mismatch": {"kind": "mis", "upper": 1.4}}, 0.0, 0.5, None),
    ({"mismatch": {"kind": "icepop", "upper": 1.6}}, 1.5, 0.0, None),
    ({"mismatch": {"kind": "icepop", "upper": 1.4}}, 0.0, 0.5, None),
    ({"mismatch": {"kind": "sequence_tis"}}, 2.0, None, None),
    ({"mismatch": {"kind": "sequence_mis"}}, 0.0, 0.5, 0.5),
    ({"mismatch": {"kind": "sequence_mis", "upper": 2.5}}, 2.25, 0.0, 0.0),
    ({"mismatch": {"kind": "geometric"}}, 0.0, 0.5, 0.5),
    ({"mismatch": {"kind": "geometric", "upper": 1.6}}, 1.0, 0.0, 0.0),
    ({"mismatch": {"kind": "geometric", "upper": 1.6}, "is_cap": 1.2}, 1.2, 0.0, 0.0),
]


@pytest.mark.parametrize(("loss", "weight", "tokens", "responses"), STEPS, ids=str)
def test_a_step_with_every_kind(
    loss: dict[str, Any],
    weight: float,
    tokens: float | None,
    responses: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss by hand, the shares that are masked, and a pass for old log-probs only where responses are weighed."""
    passes, score = [], or1.trainer.with_old_logp
    monkeypatch.setattr(or1.trainer, "with_old_logp", lambda *given: passes.append(1) or score(*given))
    trainer = trainer_of(config_of(tmp_path, [{"prompts_per_step": 1}], loss=loss))
    right, wrong = response(ZERO, ZERO, entropy=math.log(3)), response(ONE, ONE, entropy=math.log(4))
    metrics = learn(trainer, group([1, 0], [right, wrong]))
    assert metrics["optim/loss"] == close(-(weight - 1) * A / 2)
    assert metrics.get("mismatch/masked_tokens") == tokens
    assert metrics.get("mismatch/masked_sequences") == responses
    assert len(passes) == trainer.config.loss.mismatch.by_sequence


def test_a_mask_is_decided_once_a_rollout_by_the_policy_before_its_first_update(tmp_path: Path) -> None:
    """Three updates that move the policy: the ratio moves, what is masked does not."""
    loss = {"mismatch": {"kind": "geometric", "lower": 0.9, "upper": 1.1}}
    trainer = trainer_of(config_of(tmp_path, [{"prompts_per_step": 1, "reuse": 3}], optim={"lr": 1e-1}, loss=loss))
    right, wrong = response(ZERO, ZERO, entropy=math.log(2)), response(ONE, entropy=math.log(3))
    metrics = learn(trainer, group([1, 0], [right, wrong]))
    assert metrics["policy/ratio_mean"] != 1 and metrics["mismatch/masked_sequences"] == 0.5
    assert metrics["mismatch/masked_tokens"] == close(1 / 3)
