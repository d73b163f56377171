"""Baselines other than GRPO's, by `loss.advantage`: RLOO and REINFORCE++. docs/objectives.md compares them."""

# P prompts, M responses each

from __future__ import annotations

from typing import Literal

import numpy as np

from or1.magic.advantage import AdvantageMask, group_advantages

AdvantageKind = Literal["group", "rloo", "reinforce_pp", "reinforce_pp_baseline"]


def advantages(
    rewards_PM: np.ndarray,
    kind: AdvantageKind = "group",
    *,
    truncated_PM: np.ndarray | None = None,
    mask: AdvantageMask = "none",
    scale_std: bool = True,
    eps: float = 1e-6,
) -> np.ndarray:
    """Return the advantages of a step's responses, f64[P, M]. Arguments are those of `group_advantages`.

    group                  Eq. 2.5; the only kind that reads scale_std
    rloo                   `rloo`
    reinforce_pp           (r - mean) / (std + eps) over the whole step: REINFORCE++ (arXiv:2501.03262), whose step is
                           Eq. 2.5 with all responses as one group
    reinforce_pp_baseline  `scaled_by_step`

    A group of equal rewards has advantages of exactly 0, except with reinforce_pp. NaN stays NaN. Raises ValueError for
    a mask without truncated_PM.
    """
    rewards_PM = np.asarray(rewards_PM, dtype=np.float64)
    if kind == "group":
        return group_advantages(rewards_PM, eps, truncated_PM=truncated_PM, mask=mask, scale_std=scale_std)
    if kind == "reinforce_pp":
        cut = None if truncated_PM is None else truncated_PM.reshape(1, -1)
        flat = group_advantages(rewards_PM.reshape(1, -1), eps, truncated_PM=cut, mask=mask)
        return flat.reshape(rewards_PM.shape)
    # With "after", a truncated response takes part in every mean, and loses its own advantage at the end.
    early: AdvantageMask = "before" if mask == "before" else "none"
    centred_PM = group_advantages(rewards_PM, eps, truncated_PM=truncated_PM, mask=early, scale_std=False)
    compared_PM = ~np.isnan(rewards_PM)
    if mask == "before" and truncated_PM is not None:
        compared_PM &= ~truncated_PM
    found_PM = rloo(centred_PM, compared_PM) if kind == "rloo" else scaled_by_step(centred_PM, compared_PM, eps)
    if mask == "after":
        if truncated_PM is None:
            raise ValueError("advantage mask 'after' needs truncated_PM; pass which responses were cut, or use 'none'")
        found_PM[truncated_PM & ~np.isnan(rewards_PM)] = 0.0
    return found_PM


def rloo(centred_PM: np.ndarray, compared_PM: np.ndarray) -> np.ndarray:
    """Return A_ij = r_ij - mean of r_ik over k != j, the leave-one-out baseline (RLOO, arXiv:2402.14740), f64[P, M].

    With n compared responses this is (r - mean) n / (n - 1).

    centred_PM   f64[P, M], r - mean of the group
    compared_PM  bool[P, M], responses that count in the mean
    """
    count_P1 = compared_PM.sum(axis=1, keepdims=True)
    return np.asarray(centred_PM * count_P1 / np.maximum(count_P1 - 1, 1))


def scaled_by_step(centred_PM: np.ndarray, compared_PM: np.ndarray, eps: float) -> np.ndarray:
    """Return A = (r - mean of the group) / (std + eps) with one std of all differences of the step, f64[P, M].

    REINFORCE++-baseline (arXiv:2501.03262). The mean of the differences is 0 already. Arguments as in `rloo`.
    """
    squares = np.square(centred_PM).sum(where=compared_PM)
    return np.asarray(centred_PM / (np.sqrt(squares / max(int(compared_PM.sum()) - 1, 1)) + eps))
