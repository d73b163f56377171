"""Rewards: what a response is worth, and why."""

from or1.reward.make import make_scorer

__all__ = ["make_scorer"]
