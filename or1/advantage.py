"""Group-relative advantages (Skywork-OR1 report, Eq. 2.5)."""

# P prompts, M responses each

from __future__ import annotations

import numpy as np


def group_advantages(rewards_PM: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """A_ij = (r_ij - mean_i) / (std_i + eps), with the sample standard deviation (ddof 1).

    rewards_PM  f64[P, M], M >= 2
    returns     f64[P, M]; a row of equal rewards becomes exactly 0
    """
    centred_PM = rewards_PM - rewards_PM.mean(axis=1, keepdims=True)
    return centred_PM / (rewards_PM.std(axis=1, ddof=1, keepdims=True) + eps)
