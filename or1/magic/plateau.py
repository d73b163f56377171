"""Detection of a plateau of evaluations: a straight line through the last ones, and the error of its slope."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from or1.config import StageConfig
from or1.core.records import AVG_KEY, number

SURENESS = 2.0
"""Standard errors by which the true rise may exceed its estimate: a rise is missed about once in forty tests."""

Point = tuple[int, float, float]
"""Step, accuracy or mean reward, truncation rate; NaN where there is no number."""


def has_plateaued(history: Sequence[Point], stage: StageConfig) -> bool:
    """Return True if the last two windows of `plateau_evals` evaluations are flat.

    Both signals must be flat: while accuracy rises or truncation falls, the current context is not used up. Flat means
    that the gain of a window, plus two standard errors, is below `plateau_gain`. The best evaluation so far is no
    measure: the maximum of many noisy values grows by itself and hides a rise. Evaluations without a number are
    ignored.
    """
    looked_at = 2 * stage.plateau_evals
    if len(history) < looked_at:
        return False
    recent = history[-looked_at:]
    # Steps that one window spans.
    span = (recent[-1][0] - recent[0][0]) / (looked_at - 1) * stage.plateau_evals
    return all(_most(recent, column, sign) * span < stage.plateau_gain for column, sign in ((1, 1), (2, -1)))


def _most(points: Sequence[Point], column: int, sign: int) -> float:
    """Return the largest gain per step that the points allow; 0 if fewer than two have a number."""
    given = np.array([(p[0], sign * p[column]) for p in points if math.isfinite(p[column])], dtype=np.float64)
    if len(given) < 2:
        return 0.0
    (steps, values) = (given - given.mean(axis=0)).T
    spread = float(np.square(steps).sum())
    slope = float((steps * values).sum()) / spread
    if len(given) == 2:  # two points are on their line, so the noise is unknown
        return slope
    residual = float(np.square(values - slope * steps).sum()) / (len(given) - 2)
    return slope + SURENESS * math.sqrt(residual / spread)


def eval_level(metrics: Mapping[str, float]) -> float | None:
    """Return the level of an evaluation, the mean over its sets; None if the metrics hold no evaluation.

    The level of a set is its accuracy. With graded rewards it is the mean reward, because accuracy counts only
    rewards of at least 1.
    """
    levels = []
    for key, value in metrics.items():
        if found := AVG_KEY.fullmatch(key):
            graded = number(metrics.get(f"eval/{found[1]}/graded"), 0.0) > 0
            levels.append(number(metrics.get(f"eval/{found[1]}/reward_mean")) if graded else float(value))
    return float(np.mean(levels)) if levels else None
