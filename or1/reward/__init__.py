"""Rewards: score responses with verifiers or user-defined functions, in processes that can be killed."""

from or1.reward.make import make_scorer

__all__ = ["make_scorer"]
