"""or1.magic.tensors, for trainers of one's own, against hand-computed numbers and the trainer's own functions."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from or1 import magic
from or1.magic import advantage


def test_advantages_are_the_trainers_and_exactly_zero_for_equal_rewards() -> None:
    rewards = torch.tensor([[1.0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1], [1, 1, 0, 0.5]], dtype=torch.float64)
    got = magic.group_advantages(rewards)
    assert got[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert not got[1].any()
    np.testing.assert_allclose(got[[0, 2]], advantage.group_advantages(rewards[[0, 2]].numpy()), rtol=1e-12)


def test_rejected_tokens_leave_the_denominator() -> None:
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]])
    kept = magic.reject_zero_advantage(mask, rewards)
    assert kept.tolist() == [[1, 1, 0], [1, 0, 0]] + [[0, 0, 0]] * 4
    assert float(magic.token_denominator(kept)) == 3 and float(magic.token_denominator(kept * 0)) == 1
    with pytest.raises(ValueError, match="mask has 5 rows"):
        magic.reject_zero_advantage(mask[:5], rewards)


def test_entropy_is_the_mean_over_masked_tokens() -> None:
    logp = torch.tensor([[-1.0, -3.0, float("nan")], [-2.0, -9.0, -9.0]])
    assert magic.rollout_entropy(logp, torch.tensor([[1, 1, 0], [1, 0, 0]])) == pytest.approx(2.0)
    assert magic.rollout_entropy(logp, torch.zeros(2, 3)) == 0.0


def test_the_controller_takes_plain_numbers_and_refuses_senseless_ones() -> None:
    controller = magic.EntropyController(target=1.0, delta=0.01, coef_max=1.0, variant="paper")
    assert controller.alpha(0.5) == 0.0
    controller.update(0.5)
    assert controller.alpha(0.5) == pytest.approx(0.01) and controller.alpha(1.5) == 0.0
    again = magic.EntropyController(target=1.0).restore(controller.state())
    assert again.state() == controller.state()
    for bad, message in (({"delta": 0.0}, "delta=0"), ({"coef_min": 2.0}, r"coef in \[2"), ({"variant": "x"}, "'x'")):
        with pytest.raises(ValueError, match=message):
            magic.EntropyController(**bad)


def test_the_controller_needs_neither_pydantic_nor_torch() -> None:
    code = "import sys, or1.magic.entropy; print({'pydantic', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
