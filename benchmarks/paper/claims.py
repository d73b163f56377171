"""The report's claims as statements about arms, with the manipulation check of each. Committed before the runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.paper import measures
from benchmarks.paper.arms import ADAPTIVE, CONSTANTS
from benchmarks.paper.measures import MEASURES, MIDDLE, Check, Measure, Record, Records
from benchmarks.paper.rule import Expect, Question

ON = "(1,64,64,1)"
TWO, TWICE, FOUR, REUSE = "(2,64,32,1)", "(2,64,64,2)", "(4,64,16,1)", "(4,64,64,4)"
FILLED = "(4,64,16,1) filled"
SMALL2, SMALL4 = "(1,32,32,1)", "(1,16,16,1)"
FAST2, FAST4 = "(1,64,64,1) lr x 2", "(1,64,64,1) lr x 4"
_CONSTANTS = [f"(2,64,32,1) constant {c:g}" for c in CONSTANTS]
LOW, SECOND, THIRD, HIGH = _CONSTANTS

SLOPE = Measure(
    "accuracy in the last quarter, gained with each doubling of the entropy after 30 % of the run",
    lambda _: 0.0,
    least=0.015,
    margin=0.0025,
)
"""The slope of a line through a seed's arms; not a number of one run."""
_COMPARED = (ON, TWO, TWICE, FOUR, REUSE, FAST2, FAST4, LOW, SECOND)


@dataclass(frozen=True)
class Statement:
    """The claim that a number of `left` is `expect` (than) that of `right`, or than zero if there is no right.

    check    manipulation check; a statement whose check fails is not tested
    control  True if the report makes no such statement
    """

    left: str
    measure: str
    expect: Expect
    right: str | None
    check: Callable[[Records], Check]
    control: bool = False

    @property
    def number(self) -> Measure:
        """The compared number."""
        return SLOPE if self.measure == "slope" else MEASURES[self.measure]

    def words(self) -> str:
        """Return the statement as a sentence."""
        if self.measure == "slope":
            return f"{SLOPE.words}, over {len(_COMPARED)} arms: above zero"
        than = {"higher": "higher than", "lower": "lower than", "same": "the same as"}[self.expect]
        return f"{self.left}: {self.number.words} {than} {self.right or 'zero change'}"

    def arms(self) -> tuple[str, ...]:
        """Return the arms that the statement compares."""
        return _COMPARED if self.measure == "slope" else tuple(a for a in (self.left, self.right) if a)

    def differences(self, records: Records) -> list[float]:
        """Return left - right of every seed that all arms have, in order of the seeds."""
        runs = [{r["seed"]: r for r in measures.of_arm(records, arm)} for arm in self.arms()]
        seeds = sorted(set.intersection(*(set(of) for of in runs)))
        if self.measure == "slope":
            return [_slope([of[seed] for of in runs]) for seed in seeds]
        values = [[self.number.of(of[seed]) for seed in seeds] for of in runs]
        return values[0] if len(values) == 1 else [a - b for a, b in zip(*values, strict=True)]

    def question(self, records: Records, check: Check) -> Question:
        """Return what the rule needs."""
        number = self.number
        return Question(self.expect, self.differences(records), number.least, number.margin, check.passed)


def _slope(runs: Sequence[Record]) -> float:
    entropy = [math.log2(measures.at(r, "entropy", MIDDLE)) for r in runs]
    return statistics.linear_regression(entropy, [MEASURES["accuracy"].of(r) for r in runs]).slope


@dataclass(frozen=True)
class Claim:
    """A claim: what the report says, its statements, and how the plot shows it."""

    key: str
    title: str
    report: str
    statements: tuple[Statement, ...]
    shown: tuple[str, ...]
    by: str = "share"  # axis of the plot: "share" of the run (equal responses) or "rollouts"

    @property
    def arms(self) -> list[str]:
        """Arms that the claim needs."""
        return list(dict.fromkeys([arm for s in self.statements for arm in s.arms()] + list(self.shown)))


_SPAN = partial(measures.spans, arms=_CONSTANTS)


def _collapsed(arm: str) -> Callable[[Records], Check]:
    return partial(measures.collapses, arm=arm)


def _kept(arm: str, base: str) -> Callable[[Records], Check]:
    return partial(measures.keeps, arm=arm, base=base)


def _controls(arm: str) -> Callable[[Records], Check]:
    return partial(measures.controls, arm=arm)


def _adaptive_helps(arm: str) -> Callable[[Records], Check]:
    def check(records: Records) -> Check:
        on, kept = measures.controls(records, arm), measures.keeps(records, arm, FOUR)
        return Check(on.passed and kept.passed, f"{on.text}; {kept.text}")

    return check


def _pair(left: str, right: str, control: bool = False) -> tuple[Statement, ...]:
    """Return the statements of claim C4 at equal updates and responses, or of its controls."""
    check = _collapsed(right)
    expect: Expect = "same" if control else "higher"
    names = ("entropy", "end entropy", "accuracy")
    return tuple(Statement(left, name, expect, right, check, control) for name in names)


_CLIPPED = [f"{REUSE} clip {high}" for high in ("0.25", "0.265", "0.28", "0.5")]
_CLIPS = partial(measures.clips, arm=REUSE)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "C1",
        "The faster entropy collapses, the worse the accuracy (section 4.2)",
        "The run with the coefficient that keeps entropy (5e-3) tests better than the one that loses it (1e-3).",
        (
            Statement("all", "slope", "higher", None, partial(measures.ranges, arms=_COMPARED)),
            Statement(SECOND, "accuracy", "higher", TWO, _kept(SECOND, TWO)),
        ),
        (ON, TWO, REUSE, SECOND),
    ),
    Claim(
        "C2",
        "On-policy, batch and group size barely move the entropy (section 4.3)",
        "D_R of 16, 32, 64 and groups of 4, 8, 16 give the same entropy curves, none collapses.",
        tuple(
            Statement(arm, "entropy by rollouts", "same", ON, measures.falls)
            for arm in (SMALL2, SMALL4, f"{ON} group 4", f"{ON} group 16")
        ),
        (ON, SMALL2, SMALL4, f"{ON} group 4", f"{ON} group 16"),
        by="rollouts",
    ),
    Claim(
        "C3",
        "More SGD steps a rollout collapse the entropy; on-policy is slower and best in the end (ablation 6)",
        "With N_SGD of 2 and 4 entropy collapses within few steps; on-policy learns slower and ends best.",
        (
            *(Statement(arm, "entropy", "lower", ON, measures.learns) for arm in (TWO, TWICE, FOUR, REUSE)),
            *(Statement(arm, "early", "higher", ON, measures.learns) for arm in (TWO, TWICE, FOUR, REUSE)),
            *(Statement(arm, "accuracy", "lower", ON, _collapsed(arm)) for arm in (TWO, TWICE, FOUR, REUSE)),
            # Not in the report: the steps of (4,64,16,1) when or1 fills its minibatches.
            Statement(FILLED, "entropy", "lower", ON, measures.learns, control=True),
            Statement(FILLED, "accuracy", "lower", ON, _collapsed(FILLED), control=True),
        ),
        (ON, TWO, FOUR, REUSE),
    ),
    Claim(
        "C4",
        "The cause is off-policy data, not the small minibatch (ablation 7)",
        "At equal D_T, on-policy training does not collapse and wins late. The axis is rollouts, so updates differ.",
        (
            Statement(SMALL2, "entropy by rollouts", "higher", TWO, _collapsed(TWO)),
            Statement(SMALL4, "entropy by rollouts", "higher", FOUR, _collapsed(FOUR)),
            Statement(SMALL4, "accuracy by rollouts", "higher", FOUR, _collapsed(FOUR)),
            *_pair(SMALL2, TWO),
            *_pair(SMALL4, FOUR),
        ),
        (SMALL4, FOUR, ON),
    ),
    Claim(
        "D",
        "Control: the distance that a rollout moves the policy does the same without stale data",
        "Not in the report, which has one learning rate.",
        (
            *(Statement(arm, "entropy", "lower", ON, measures.learns, control=True) for arm in (FAST2, FAST4)),
            *(Statement(arm, "accuracy", "lower", ON, _collapsed(arm), control=True) for arm in (FAST2, FAST4)),
            *_pair(FAST2, TWO, control=True),
            *_pair(FAST4, FOUR, control=True),
        ),
        (ON, FAST2, FAST4, TWO, FOUR),
    ),
    Claim(
        "C5",
        "A larger rollout batch does not rescue many SGD steps",
        "(4,256,64,1) collapses as (4,64,16,1) does, perhaps faster.",
        (Statement("(4,256,64,1)", "entropy", "lower", ON, measures.learns),),
        (ON, FOUR, "(4,256,64,1)"),
    ),
    Claim(
        "C6",
        "A constant entropy coefficient decays or explodes (ablation 8)",
        "1e-4: entropy decays to 0. 5e-4 and above: entropy explodes and the model collapses.",
        (
            Statement(LOW, "rise", "lower", None, _SPAN),
            Statement(SECOND, "rise", "lower", None, _SPAN),
            Statement(THIRD, "rise", "higher", None, _SPAN),
            Statement(HIGH, "rise", "higher", None, _SPAN),
            Statement(THIRD, "accuracy", "lower", SECOND, _SPAN),
            Statement(HIGH, "accuracy", "lower", SECOND, _SPAN),
        ),
        tuple(_CONSTANTS),
    ),
    Claim(
        "C8",
        "Adaptive control keeps the entropy of off-policy training, oscillating, and helps (ablation 9)",
        "(4,64,16,1) with target 0.2: no collapse, a better test score, and entropy that oscillates.",
        tuple(
            statement
            for arm in ADAPTIVE
            for statement in (
                Statement(arm, "entropy", "higher", FOUR, _controls(arm)),
                Statement(arm, "swing", "higher", FOUR, _controls(arm)),
                Statement(arm, "accuracy", "higher", FOUR, _adaptive_helps(arm)),
            )
        ),
        (FOUR, *ADAPTIVE),
    ),
    Claim(
        "C9",
        "Clip-higher keeps the entropy, up to a point (ablation 10)",
        "On (4,64,16,1), 0.25 and 0.265 keep the entropy and score best; at 0.28 entropy shoots up without a gain.",
        (
            Statement(f"{FOUR} clip 0.28", "entropy", "higher", FOUR, partial(measures.clips, arm=FOUR)),
            Statement(f"{FOUR} clip 0.28", "accuracy", "higher", FOUR, partial(measures.clips, arm=FOUR)),
            *(Statement(arm, "entropy", "higher", REUSE, _CLIPS) for arm in _CLIPPED),
            *(Statement(arm, "accuracy", "higher", REUSE, _CLIPS) for arm in _CLIPPED[:2]),
            Statement(_CLIPPED[2], "entropy", "higher", _CLIPPED[1], _CLIPS),
            Statement(_CLIPPED[2], "accuracy", "same", _CLIPPED[1], _CLIPS),
        ),
        (REUSE, *_CLIPPED),
    ),
)

MODEL_CLAIMS: tuple[Claim, ...] = (
    Claim(
        "B3",
        "C3 with a transformer and or1's Trainer",
        "With N_SGD of 4 entropy collapses within few steps; on-policy learns slower and ends best.",
        (
            Statement(REUSE, "entropy", "lower", ON, measures.learns),
            Statement(REUSE, "early", "higher", ON, measures.learns),
            Statement(REUSE, "accuracy", "lower", ON, _collapsed(REUSE)),
        ),
        (ON, REUSE, FAST2),
    ),
    Claim(
        "BD",
        "The control D with a transformer and or1's Trainer",
        "Not in the report, which has one learning rate.",
        (
            Statement(FAST2, "entropy", "lower", ON, measures.learns, control=True),
            Statement(FAST2, "accuracy", "lower", ON, _collapsed(FAST2), control=True),
        ),
        (ON, REUSE, FAST2),
    ),
)
