"""The four equations of the Skywork-OR1 report that or1 implements, by number, against numbers computed by hand.

2.5 advantages   3.1 the loss   3.2 the entropy coefficient   4.1 optimizer steps a rollout

tests/train/test_update.py holds the gradient of Eq. 3.1 to a naive implementation in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from or1.config import EntropyConfig, LossConfig, RewardConfig, StageConfig
from or1.core.types import Response
from or1.magic.advantage import group_advantages
from or1.magic.entropy import EntropyController
from or1.magic.selection import minibatches, select
from tests.helpers.hand_run import ENTROPY, EOS, ONE, STAGE, ZERO, config_of, group, learn, response, trainer_of


def test_equation_2_5_advantages_use_the_sample_standard_deviation() -> None:
    """A_ij = (r_ij - mean_i) / std_i. Rewards 1, 0, 0, 0: mean 1/4, variance (9/16 + 3/16) / 3 = 1/4, so 1.5 and -0.5.

    Rewards 1, 1, 0, 0: mean 1/2, variance 1/3. The trainer adds 1e-6 to std, as the released code does.
    """
    expected = [[1.5, -0.5, -0.5, -0.5], [math.sqrt(3) / 2] * 2 + [-math.sqrt(3) / 2] * 2]
    rewards = np.array([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    assert group_advantages(rewards, eps=0.0) == pytest.approx(np.array(expected), rel=1e-12)
    # What the update is given: one number for every token of a response.
    groups = [group(r.tolist(), [response(ZERO, EOS)] * 4) for r in rewards]
    stage = StageConfig(**STAGE | {"group_size": 4})
    chosen = select(groups, LossConfig(), RewardConfig(), stage)
    (batch,) = minibatches(chosen, LossConfig(), stage)
    assert [s.advantage for s in batch.sequences] == pytest.approx(np.ravel(expected), rel=1e-5)


def with_ratios(ratios: Sequence[float], *tokens: int) -> Response:
    """Return a response whose tokens have these probability ratios of the trained to the sampling policy."""
    p = np.array([{ZERO: 0.5, ONE: 0.25, EOS: 0.25}[t] for t in tokens])
    return replace(response(*tokens), logp=np.log(p / np.array(ratios)).astype(np.float32))


def test_equation_3_1_the_loss(tmp_path: Path) -> None:
    """L = -1/T_k sum {min(ratio A, clip(ratio, 0.8, 1.2) A) + alpha H} over the 2 + 3 tokens of the kept group.

    A is +-sqrt(1/2), H = 1.5 log 2 and alpha 0.01. Right, ratios 3/2 and 1/2: 1.2 A + 0.5 A. Wrong, ratios 1/2, 3/2
    and 1: -0.8 A - 1.5 A - A. The second group, all wrong, is not in the sum and not in T_k = 5.
    """
    entropy = {"control": "constant", "coef": 0.01}
    trainer = trainer_of(config_of(tmp_path, loss={"old_logp": "rollout", "entropy": entropy}))
    right, wrong = with_ratios([1.5, 0.5], ZERO, EOS), with_ratios([0.5, 1.5, 1.0], ONE, ZERO, EOS)
    metrics = learn(trainer, group([1, 0], [right, wrong]), group([0, 0], [response(ONE, ONE, ONE)] * 2))
    a = math.sqrt(0.5)
    assert metrics["optim/loss"] == pytest.approx(-((1.7 - 3.3) * a + 5 * 0.01 * ENTROPY) / 5, rel=1e-5)
    # Two of five terms are the clipped ones: 1.2 A and -0.8 A.
    assert metrics["policy/clip_frac"] == pytest.approx(2 / 5)
    assert metrics["policy/ratio_mean"] == pytest.approx((1.5 + 0.5 + 0.5 + 1.5 + 1) / 5)
    assert metrics["policy/entropy_exact"] == pytest.approx(ENTROPY)


def test_equation_3_2_the_entropy_coefficient() -> None:
    """alpha_k = c_k 1{e_k <= target}; c_0 = 0 rises by delta below the target, falls above, and stays on it."""
    c = EntropyController.start(EntropyConfig(control="adaptive", variant="paper", target=0.2))
    seen = []
    for entropy in (0.1, 0.1, 0.3, 0.2, 0.1):
        seen.append((c.coef, c.alpha(entropy)))
        c.update(entropy)
    coefs, alphas = zip(*seen, strict=True)
    assert coefs == pytest.approx((0.0, 0.005, 0.010, 0.005, 0.005))
    assert alphas == pytest.approx((0.0, 0.005, 0.0, 0.005, 0.005))
    assert c.coef == pytest.approx(0.010)


@pytest.mark.parametrize(
    ("d_r", "d_t", "reuse", "updates"), [(64, 64, 1, 1), (64, 32, 1, 2), (64, 64, 2, 2), (64, 16, 1, 4), (64, 64, 4, 4)]
)
def test_equation_4_1_updates_of_a_rollout(d_r: int, d_t: int, reuse: int, updates: int) -> None:
    """N_SGD = D_R / D_T N_reuse, for the quadruples of the report's section 4."""
    stage = StageConfig(**STAGE | {"prompts_per_step": d_r, "minibatch_prompts": d_t, "reuse": reuse})
    assert stage.updates_per_step == updates
    assert stage.on_policy == (updates == 1)
    # The minibatches that a step makes of as many kept groups, each passed `reuse` times.
    groups = [group([1, 0], [response(ZERO)] * 2)] * d_r
    chosen = select(groups, LossConfig(), RewardConfig(), stage)
    parts = minibatches(chosen, LossConfig(), stage)
    assert len(parts) * reuse == updates and {len(part.sequences) for part in parts} == {d_t * 2}
