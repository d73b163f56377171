"""RLOO and REINFORCE++ by hand, with truncation masks and missing rewards, and which groups each rejects."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from or1.magic import group_advantages
from or1.magic.baselines import AdvantageKind, advantages
from or1.magic.selection import select
from tests.helpers.hand_run import ZERO, config_of, group, response

NAN = math.nan


def test_rloo_leaves_the_response_itself_out() -> None:
    """r - mean of the others: 3 - (1 + 2) / 2 and so on; of 1 and 0 with a missing reward, 1 - 0 and 0 - 1."""
    found = advantages(np.array([[3, 1, 2], [1, 0, NAN], [2, 2, 2]]), "rloo")
    np.testing.assert_allclose(found, [[1.5, -1.5, 0], [1, -1, NAN], [0, 0, 0]], atol=1e-15)
    assert not found[2].any(), "exactly 0"
    assert np.isnan(advantages(np.array([[1.0, NAN]]), "rloo")[0]).tolist() == [False, True]


def test_reinforce_pp_compares_all_responses_of_the_step() -> None:
    """Rewards 1, 1, 1, 0, 0, 0: mean 1/2, std sqrt(6 / 4 / 5). With the group's mean: 0, 1/3, 1/3, -2/3, ..."""
    rewards = np.array([[1.0, 1, 1], [0, 0, 0]])
    assert advantages(rewards, "reinforce_pp", eps=0)[0].tolist() == pytest.approx([0.5 / math.sqrt(0.3)] * 3)
    assert not advantages(rewards, "reinforce_pp_baseline").any()
    assert not advantages(np.full((2, 3), 0.7), "reinforce_pp").any(), "equal rewards, exactly 0"
    rewards = np.array([[1.0, 1, 0], [0.5, NAN, 0.5]])
    std = math.sqrt((1 / 9 + 1 / 9 + 4 / 9) / 4)
    found = advantages(rewards, "reinforce_pp_baseline", eps=0)
    np.testing.assert_allclose(found, [[1 / 3 / std, 1 / 3 / std, -2 / 3 / std], [0, NAN, 0]], rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "mask", "expected"),
    [
        ("rloo", "before", [1.0, -1.0, 0.0]),
        ("rloo", "after", [1.0, -0.5, 0.0]),
        ("reinforce_pp_baseline", "before", [A := math.sqrt(0.5), -A, 0.0]),
        ("reinforce_pp_baseline", "after", [2 / math.sqrt(3), -1 / math.sqrt(3), 0.0]),
        ("reinforce_pp", "before", [A, -A, 0.0]),
        ("reinforce_pp", "after", [2 / math.sqrt(3), -1 / math.sqrt(3), 0.0]),
    ],
)
def test_truncation_masks(kind: AdvantageKind, mask: str, expected: list[float]) -> None:
    """Rewards 1, 0 and 0 of a response that was cut. after: it counts in every mean and std, and has no advantage."""
    cut = np.array([[False, False, True]])
    found = advantages(np.array([[1.0, 0, 0]]), kind, truncated_PM=cut, mask=mask, eps=0)
    assert found[0].tolist() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="needs truncated_PM"):
        advantages(np.array([[1.0, 0, 0]]), kind, mask=mask)


@pytest.mark.parametrize("kind", ["group", "rloo", "reinforce_pp_baseline"])
def test_a_group_of_equal_rewards_is_rejected_also_under_a_length_penalty(kind: str, tmp_path: Path) -> None:
    loss, reward = {"advantage": kind}, {"overlong_buffer": 2}
    config = config_of(tmp_path, [{"max_response_tokens": 3}], loss=loss, reward=reward)
    some = [response(ZERO), response(ZERO, ZERO)]
    groups = [group([1, 0], some), group([1, 1], some), group([0, 0], some[:1] * 2)]
    assert select(groups, config.loss, config.reward, config.stage[0]).flags == [True, False, False]


def test_reinforce_pp_trains_solved_and_failed_groups_unless_all_are_equal(tmp_path: Path) -> None:
    config = config_of(tmp_path, loss={"advantage": "reinforce_pp"})
    pair = [response(ZERO)] * 2
    chosen = select([group([1, 1], pair), group([0, 0], pair)], config.loss, config.reward, config.stage[0])
    assert chosen.flags == [True, True] and chosen.advantages_KM.sum() == 0 and (chosen.advantages_KM[0] > 0).all()
    assert select([group([1, 1], pair)] * 2, config.loss, config.reward, config.stage[0]).flags == [False, False]


def test_tensors_have_the_same_baselines() -> None:
    rewards = torch.tensor([[3.0, 1, 2], [1, 0, 1]])
    for kind in ("group", "rloo", "reinforce_pp", "reinforce_pp_baseline"):
        want = torch.from_numpy(advantages(rewards.numpy(), kind))
        torch.testing.assert_close(group_advantages(rewards, kind=kind), want.float())
