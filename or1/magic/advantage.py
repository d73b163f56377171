"""Group-relative advantages (Skywork-OR1 report, Eq. 2.5) and the truncation masks of its section 3.2.3."""

# P prompts, M responses each

from __future__ import annotations

from collections.abc import Sequence
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
    """A_ij = (r_ij - mean_i) / (std_i + eps), with the sample standard deviation (ddof 1).

    rewards_PM    f64[P, M], M >= 2; NaN where a response has no reward
    truncated_PM  bool[P, M], responses cut at the token limit; needed unless mask is "none"
    mask          "none": a truncated response counts like any wrong one (the report's choice); "before": it is left out
                  of mean and std and has A = 0; "after": it counts in mean and std, but has A = 0
    scale_std     False leaves the division by std out, as Dr.GRPO does (arXiv:2503.20783)
    returns       f64[P, M]; a row of equal rewards becomes exactly 0, and so does one with fewer than two responses to
                  compare; NaN stays, and counts for nothing in its row

    Raises ValueError if a mask is asked for without truncated_PM.
    """
    if mask != "none" and truncated_PM is None:
        raise ValueError(f"advantage mask {mask!r} needs truncated_PM; pass which responses were cut, or mask='none'")
    compared_PM = ~np.isnan(rewards_PM)
    if mask == "before":
        compared_PM &= ~truncated_PM
    count_P1 = compared_PM.sum(axis=1, keepdims=True)
    mean_P1 = rewards_PM.sum(axis=1, where=compared_PM, keepdims=True) / np.maximum(count_P1, 1)
    low_P1 = rewards_PM.min(axis=1, where=compared_PM, initial=np.inf, keepdims=True)
    high_P1 = rewards_PM.max(axis=1, where=compared_PM, initial=-np.inf, keepdims=True)
    # The mean of equal rewards may be off by a rounding error, which a std of the same size would blow up to 1.
    advantages_PM = (rewards_PM - mean_P1) * (low_P1 < high_P1)
    if scale_std:
        squares_P1 = np.square(advantages_PM).sum(axis=1, where=compared_PM, keepdims=True)
        advantages_PM /= np.sqrt(squares_P1 / np.maximum(count_P1 - 1, 1)) + eps
    if mask == "none":
        return advantages_PM
    # NaN times 0 would do, but a response without a reward must not become one that is trained with advantage 0.
    return np.where(truncated_PM & ~np.isnan(rewards_PM), 0.0, advantages_PM)


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


def overlong_penalty(lengths_PM: np.ndarray, limit: int, buffer: int) -> np.ndarray:
    """The (non-positive) amount to add to each reward, so that a response is warned before it is cut.

        0                            up to limit - buffer tokens
        (limit - buffer - L)/buffer  beyond, falling linearly
        -1                           at the limit, where the response is truncated

    lengths_PM  i64[P, M] response tokens;  limit: max_response_tokens;  buffer: 1 <= buffer <= limit tokens
    returns     f64[P, M]
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"overlong buffer is {buffer} tokens; it must lie between 1 and the response limit {limit}")
    return -np.clip((lengths_PM - (limit - buffer)) / buffer, 0.0, 1.0)
