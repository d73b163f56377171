"""Group-relative advantages (Skywork-OR1 report, Eq. 2.5), and truncation masks (section 3.2.3).

or1/magic/tensors.py has the same functions for tensors.
"""

# P prompts, M responses each

from __future__ import annotations

from typing import Literal

import numpy as np

from or1.core.types import Group

AdvantageMask = Literal["none", "before", "after"]


def group_advantages(
    rewards_PM: np.ndarray,
    eps: float = 1e-6,
    *,
    truncated_PM: np.ndarray | None = None,
    mask: AdvantageMask = "none",
    scale_std: bool = True,
) -> np.ndarray:
    """Return A_ij = (r_ij - mean_i) / (std_i + eps), with the sample standard deviation (ddof 1); f64[P, M].

    rewards_PM    f64[P, M], M >= 2; NaN where a response has no reward
    truncated_PM  bool[P, M], responses cut at the token limit; needed unless mask is "none"
    mask          "none": a truncated response counts like any wrong one (the report's choice). "before": a truncated
                  response is left out of mean and std and has A = 0. "after": it counts in mean and std, and has A = 0
    scale_std     False skips the division by std, as Dr.GRPO does (arXiv:2503.20783)

    A row of equal rewards becomes exactly 0, and so does a row with fewer than two responses to compare. NaN stays NaN,
    and is ignored in mean and std. Raises ValueError for a mask without truncated_PM.
    """
    rewards_PM = np.asarray(rewards_PM, dtype=np.float64)
    skipped_PM = np.zeros(rewards_PM.shape, dtype=bool)
    if mask != "none":
        if truncated_PM is None:
            raise ValueError(
                f"advantage mask {mask!r} needs truncated_PM; pass which responses were cut, or use 'none'"
            )
        skipped_PM = truncated_PM
    compared_PM = ~np.isnan(rewards_PM)
    if mask == "before":
        compared_PM &= ~skipped_PM
    count_P1 = compared_PM.sum(axis=1, keepdims=True)
    mean_P1 = rewards_PM.sum(axis=1, where=compared_PM, keepdims=True) / np.maximum(count_P1, 1)
    # The mean of equal rewards may be off by a rounding error, which a std of the same size would turn into 1.
    advantages_PM = (rewards_PM - mean_P1) * have_advantages(rewards_PM, compared_PM)[:, None]
    if scale_std:
        squares_P1 = np.square(advantages_PM).sum(axis=1, where=compared_PM, keepdims=True)
        advantages_PM /= np.sqrt(squares_P1 / np.maximum(count_P1 - 1, 1)) + eps
    # A response without a reward stays NaN: an advantage of 0 would be trained.
    advantages_PM[skipped_PM & ~np.isnan(rewards_PM)] = 0.0
    return np.asarray(advantages_PM)


def have_advantages(rewards_PM: np.ndarray, compared_PM: np.ndarray | None = None) -> np.ndarray:
    """Return bool[P]: True where the rewards of a group differ (section 3.1). compared_PM: the rewards to look at."""
    if compared_PM is None:
        compared_PM = ~np.isnan(rewards_PM)
    low_P = rewards_PM.min(axis=1, where=compared_PM, initial=np.inf)
    high_P = rewards_PM.max(axis=1, where=compared_PM, initial=-np.inf)
    return np.asarray(low_P < high_P)


def has_advantage(group: Group) -> bool:
    """Return True if the rewards of a group differ, so that its advantages are not all 0.

    A group without advantages adds nothing to the policy gradient. Its tokens would dilute the loss, and the entropy
    term would act on prompts that are solved or hopeless.
    """
    return bool(have_advantages(group.rewards[None])[0])
