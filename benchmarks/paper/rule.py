"""The rule that decides a statement; RULE.md says it in words. Pure functions of numbers.

A statement compares a number of two arms, seed by seed. Its difference is `left - right`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.paper.statistics import ALPHA, Interval, holm, interval, sign_test, spending

Expect = Literal["higher", "lower", "same"]
Verdict = Literal[
    "claimed direction", "claimed direction but small", "equivalent", "opposite", "not tested", "undecided"
]
DECIDED: tuple[Verdict, ...] = ("claimed direction", "claimed direction but small", "equivalent", "opposite")


@dataclass(frozen=True)
class Question:
    """What the rule needs of a statement.

    differences  left - right of each seed, in order of the seeds
    least        smallest relevant difference, d
    margin       a seed is won or lost by more than this; else a tie
    tested       the manipulation check passed
    """

    expect: Expect
    differences: Sequence[float]
    least: float
    margin: float = 0.0
    tested: bool = True


@dataclass(frozen=True)
class Finding:
    """A verdict and its numbers. p: of all seeds, by Holm. look: seeds at which the sign test decided, or 0."""

    verdict: Verdict
    effect: Interval
    won: int
    lost: int
    seeds: int
    p: float
    look: int


def decide(questions: Sequence[Question], looks: Sequence[int], alpha: float = ALPHA) -> list[Finding]:
    """Return a finding for each question of one family. Looks beyond the seeds that exist are left out."""
    signs, when, p_values = [0] * len(questions), [0] * len(questions), [1.0] * len(questions)
    for look, level in zip(looks, spending(looks, alpha), strict=True):
        if not questions or look > min(len(q.differences) for q in questions):
            break
        counts = [tally(q.differences[:look], q.margin) for q in questions]
        p_values = holm([sign_test(won, lost) for won, lost in counts])
        for i, (won, lost) in enumerate(counts):
            if p_values[i] <= level and not when[i]:
                signs[i], when[i] = (1 if won > lost else -1), look
    findings = []
    for q, sign, look, p in zip(questions, signs, when, p_values, strict=True):
        effect, (won, lost) = interval(q.differences), tally(q.differences, q.margin)
        verdict = classify(q.expect, sign, effect, q.least, q.tested)
        findings.append(Finding(verdict, effect, won, lost, len(q.differences), p, look))
    return findings


def tally(differences: Sequence[float], margin: float) -> tuple[int, int]:
    """Return how many seeds are above margin, and how many below -margin."""
    return sum(x > margin for x in differences), sum(x < -margin for x in differences)


def classify(expect: Expect, sign: int, effect: Interval, least: float, tested: bool) -> Verdict:
    """Return the verdict. sign: 1 or -1 if the sign test decided for higher or lower, else 0."""
    if not tested:
        return "not tested"
    claimed = {"higher": 1, "lower": -1, "same": 0}[expect]
    size = sign * effect.mean
    if sign and sign == claimed and size > 0:
        return "claimed direction" if size >= least else "claimed direction but small"
    if sign and sign != claimed and size >= least:
        return "opposite"
    return "equivalent" if effect.within(least) else "undecided"
