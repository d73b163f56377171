"""Rejection, the released entropy controller and stages against hand-computed numbers."""

from __future__ import annotations

import numpy as np
import pytest

from or1.config import EntropyConfig
from or1.core.types import Group, Prompt, Response, Score, Status
from or1.eval.accuracy import pass_at_k
from or1.magic.advantage import group_advantages, has_advantage
from or1.magic.entropy import EntropyController


def group_with(rewards: list[float]) -> Group:
    prompt = Prompt("p", "s", "1+1", np.array([1], dtype=np.int32), ("2",))
    response = Response(np.array([1], dtype=np.int32), np.array([-0.5], dtype=np.float32), "stop", 0, "2")
    return Group(prompt, (response,) * len(rewards), tuple(Score(r, Status.OK if r else Status.WRONG) for r in rewards))


def test_equal_rewards_have_advantage_exactly_zero_and_are_rejected() -> None:
    assert (group_advantages(np.ones((1, 4))) == 0).all()
    groups = [group_with([1, 1]), group_with([1, 0]), group_with([0, 0]), group_with([0.25, 0.5])]
    assert [has_advantage(each) for each in groups] == [False, True, False, True]


def controller(variant: str, **settings: float) -> EntropyController:
    return EntropyController.start(EntropyConfig(control="adaptive", variant=variant, target=0.2, **settings))


def test_script_variant_lags_one_step_and_clips() -> None:
    c = controller("script", delta=0.002, coef_max=0.005)
    seen = []
    for entropy in (0.1, 0.1, 0.1, 0.3, 0.1, 0.2):
        seen.append(c.alpha(entropy))
        c.update(entropy)
    # The bonus of the 0.3 step was decided by the step before; the step after it goes without.
    assert seen == pytest.approx([0.0, 0.002, 0.004, 0.005, 0.0, 0.005])
    # On target counts as not below: c falls, as in the released code.
    assert c.coef == pytest.approx(0.003)
    assert c.gate is False


def test_constant_and_none_ignore_the_entropy() -> None:
    constant = EntropyController.start(EntropyConfig(control="constant", coef=0.01))
    off = EntropyController.start(EntropyConfig())
    for entropy in (0.0, 5.0):
        assert constant.alpha(entropy) == 0.01 and off.alpha(entropy) == 0.0
        constant.update(entropy)
    assert constant.coef == 0.01


def test_script_defaults_saturate_after_fifty_steps() -> None:
    c = EntropyController.start(EntropyConfig(control="adaptive"))
    for _ in range(49):
        c.update(0.0)
    assert c.coef < 5e-3
    for _ in range(10):
        c.update(0.0)
    assert c.coef == 5e-3


@pytest.mark.parametrize(("n", "c", "k", "expected"), [(4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (4, 0, 4, 0)])
def test_pass_at_k_is_the_chance_over_all_subsets(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected)
