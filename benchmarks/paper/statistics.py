"""Statistics of the rule: exact sign test, Holm's correction, alpha spending, Student's interval. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mpmath

LOOKS = (16, 32, 48)
ALPHA = 0.05


def sign_test(won: int, lost: int) -> float:
    """Return the two-sided exact p value of `won` successes and `lost` failures, equally likely; ties left out."""
    n, most = won + lost, max(won, lost)
    tail = sum(math.comb(n, k) for k in range(most, n + 1))
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's step-down procedure, in the given order."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def spending(looks: Sequence[int], alpha: float = ALPHA) -> list[float]:
    """Return the level of each look, by the spending function of O'Brien and Fleming (Lan and DeMets 1983).

    The levels sum to alpha. Each look uses its own increment as its level, which is valid for any test and any
    dependence between the looks, if somewhat strict: the union bound.
    """
    normal = statistics.NormalDist()
    z = normal.inv_cdf(1 - alpha / 2)
    spent = [2 * (1 - normal.cdf(z / math.sqrt(n / looks[-1]))) for n in looks]
    return [after - before for before, after in zip([0.0, *spent], spent, strict=False)]


@cache
def t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's distribution, for a probability above 0.5."""

    def excess(t: mpmath.mpf) -> mpmath.mpf:
        tail = mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) / 2
        return 1 - tail - probability

    return float(mpmath.findroot(excess, (0.1, 3.0), solver="anderson"))


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences with its two-sided 90 % t interval."""

    mean: float
    low: float
    high: float

    def within(self, least: float) -> bool:
        """Return True if the interval lies between -least and least: two one-sided tests at 5 %."""
        return -least < self.low and self.high < least


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and its interval. Raises ValueError for fewer than two values."""
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 seeds; there are {len(values)}")
    mean = statistics.fmean(values)
    half = t_quantile(0.95, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)
