"""Group-relative advantages (Skywork-OR1 report, Eq. 2.5)."""

# P prompts, M responses each

from __future__ import annotations

import numpy as np


def group_advantages(rewards_PM: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """A_ij = (r_ij - mean_i) / (std_i + eps), with the sample standard deviation (ddof 1).

    rewards_PM  f64[P, M], M >= 2; NaN where a response has no reward
    returns     f64[P, M]; a row of equal rewards becomes exactly 0; NaN stays, and counts for nothing in its row
    """
    scored_PM = ~np.isnan(rewards_PM)
    scored_P = scored_PM.sum(axis=1, keepdims=True)
    centred_PM = rewards_PM - rewards_PM.sum(axis=1, where=scored_PM, keepdims=True) / np.maximum(scored_P, 1)
    squares_P = np.square(centred_PM).sum(axis=1, where=scored_PM, keepdims=True)
    return centred_PM / (np.sqrt(squares_P / np.maximum(scored_P - 1, 1)) + eps)
