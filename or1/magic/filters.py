"""Which groups are trained (Skywork-OR1 report, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from or1.core.types import Group


def has_advantage(group: Group) -> bool:
    """Whether the rewards of a group differ, so that its advantages are not all 0."""
    rewards = group.rewards[~np.isnan(group.rewards)]
    return rewards.size > 0 and bool(rewards.min() < rewards.max())


def reject_zero_advantage(groups: Sequence[Group]) -> list[Group]:
    """The groups whose rewards differ, in order.

    A group without advantages adds nothing to the policy gradient, but its tokens would dilute the loss and let the
    entropy term act on prompts that are solved or hopeless.
    """
    return [group for group in groups if has_advantage(group)]
