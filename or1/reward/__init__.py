"""Rewards: what a response is worth, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from or1.config import RewardConfig
    from or1.reward.base import Scorer


def make_scorer(config: RewardConfig) -> Scorer:
    """The scorer of `[reward]`, with its worker processes started and warm.

    Raises or1.reward.base.ScorerError if a worker does not start, for example because math-verify is missing.
    """
    from or1.reward.pool import PoolScorer

    return PoolScorer(
        workers=config.workers, timeout_s=config.timeout_s, require_think_close=config.require_think_close
    )
