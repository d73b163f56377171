"""Claims of the report (section 4 and the ablations of section 3), as statements that a rule decides.

The rule was written before the runs. A statement compares a number of two arms, seed by seed; a seed fixes the order of
the prompts. It takes the mean difference with its two-sided 95 % t interval [low, high]; "rises" compares an arm's end
with its own start. Every number has a smallest relevant difference, d, and a tolerance for sameness, 2.5 d.

    higher      reproduced if low > 0 and high >= d; not reproduced if high < d; else inconclusive.  lower: mirrored
    no higher   reproduced if high < d; not reproduced if low > 0; else inconclusive
    same        reproduced if within -2.5 d to 2.5 d; not reproduced if wholly outside; else inconclusive

A claim is reproduced if all its statements are, not reproduced if one is not, else inconclusive. Statements are not
corrected for their number: of thirty statements without any real effect, one or two would seem to hold.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.paper.history.arms import ARMS, STEPS

Record = Mapping[str, Any]
Verdict = Literal["reproduced", "not reproduced", "inconclusive"]

_SAME = 2.5  # tolerance for sameness, in units of d
# Student's t, two-sided 95 %, by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Measure:
    """A number of a run. least: the smallest relevant difference; log: True if the number is a logarithm."""

    words: str
    of: Callable[[Record, int | None], float]
    least: float
    log: bool = False


def _mean_log_entropy(record: Record, steps: int | None) -> float:
    return statistics.fmean(math.log(e) for e in record["series"]["entropy"][:steps])


def _entropy_rise(record: Record, steps: int | None) -> float:
    entropy = record["series"]["entropy"]
    return math.log(_end(entropy)) - math.log(entropy[0])


def _swing(record: Record, steps: int | None) -> float:
    """Return the log of the standard deviation of log-entropy about its regression line, in the second half."""
    logs = [math.log(e) for e in record["series"]["entropy"]]
    half = logs[len(logs) // 2 :]
    slope, start = statistics.linear_regression(range(len(half)), half)
    return math.log(statistics.pstdev(y - start - slope * x for x, y in enumerate(half)))


def _log_tokens(record: Record, steps: int | None) -> float:
    arm = ARMS[record["arm"]]
    return math.log(sum(record["series"]["length"]) * arm.prompts * arm.group)


def _end(values: Sequence[float]) -> float:
    return statistics.fmean(values[-max(len(values) // 5, 1) :])


MEASURES: dict[str, Measure] = {
    "entropy": Measure("mean entropy of the run", _mean_log_entropy, math.log(1.1), log=True),
    "end": Measure("entropy at the end", lambda r, _: math.log(_end(r["series"]["entropy"])), math.log(1.1), log=True),
    "rise": Measure("entropy at the end against the start", _entropy_rise, math.log(1.1), log=True),
    "swing": Measure("swing of entropy about its trend in the second half", _swing, math.log(1.1), log=True),
    "tokens": Measure("tokens sampled in training", _log_tokens, math.log(1.1), log=True),
    "accuracy": Measure("test accuracy at the end", lambda r, _: 50 * sum(a for _, a in r["evals"][-2:]), 2.0),
    "early": Measure("test accuracy after a fifth of the run", lambda r, _: 100 * r["evals"][1][1], 2.0),
    "reward": Measure("training reward at the end", lambda r, _: 100 * _end(r["series"]["reward"]), 2.0),
    "cut": Measure("truncated responses at the end", lambda r, _: 100 * _end(r["series"]["truncated"]), 2.0),
}


@dataclass(frozen=True)
class Statement:
    """The claim that `left`'s measure is `expect` (than) `right`'s, or zero for None, over the first `steps`."""

    left: str
    measure: str
    expect: Literal["higher", "lower", "no higher", "same"]
    right: str | None
    steps: int | None = None

    def words(self) -> str:
        """Return the statement as a sentence."""
        relation = {"higher": "higher than", "lower": "lower than", "no higher": "no higher than", "same": "same as"}
        first = f", first {self.steps} steps" if self.steps else ""
        than = "zero" if self.right is None else self.right
        return f"{self.left}: {MEASURES[self.measure].words}{first}, {relation[self.expect]} {than}"


@dataclass(frozen=True)
class Claim:
    """A claim of the report. `by` is the horizontal axis of its plot."""

    key: str
    title: str
    statements: tuple[Statement, ...]
    by: Literal["steps", "responses"] = "steps"

    @property
    def arms(self) -> list[str]:
        """Arms that the claim needs, in order of mention."""
        names = [name for s in self.statements for name in (s.right, s.left) if name is not None]
        return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Finding:
    """A decided statement: mean difference, its 95 % interval, and the number of seeds."""

    statement: Statement
    mean: float
    low: float
    high: float
    seeds: int
    verdict: Verdict


def decide(statement: Statement, records: Mapping[tuple[str, int], Record]) -> Finding:
    """Apply the rule to records by arm and seed. Raises ValueError for fewer than two common seeds."""
    measure = MEASURES[statement.measure]
    values: dict[str | None, dict[int, float]] = {None: {}}
    for (arm, seed), record in records.items():
        if arm in (statement.left, statement.right):
            values.setdefault(arm, {})[seed] = measure.of(record, statement.steps)
            values[None][seed] = 0.0
    left, right = values.get(statement.left, {}), values.get(statement.right, {})
    differences = [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]
    if len(differences) < 2:
        raise ValueError(f"'{statement.words()}' has {len(differences)} common seeds; it needs at least 2")
    mean = statistics.fmean(differences)
    half = _T95[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    verdict = _verdict(statement.expect, mean - half, mean + half, measure.least)
    return Finding(statement, mean, mean - half, mean + half, len(differences), verdict)


def conclude(findings: Sequence[Finding]) -> Verdict:
    """Return the verdict of a claim from the verdicts of its statements."""
    verdicts = {finding.verdict for finding in findings}
    for verdict in ("not reproduced", "inconclusive"):
        if verdict in verdicts:
            return verdict
    return "reproduced"


def _verdict(expect: str, low: float, high: float, least: float) -> Verdict:
    if expect == "lower":
        return _verdict("higher", -high, -low, least)
    holds, fails = {
        "higher": (low > 0 and high >= least, high < least),
        "no higher": (high < least, low > 0),
        "same": (-_SAME * least < low and high < _SAME * least, low > _SAME * least or high < -_SAME * least),
    }[expect]
    return "reproduced" if holds else "not reproduced" if fails else "inconclusive"


_ON, _TWO, _FOUR = "(1,32,32,1)", "(2,32,16,1)", "(4,32,8,1)"
_ADAPTIVE = "(4,32,8,1) adaptive"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "C1",
        "The faster entropy collapses, the worse the test accuracy (section 4.2)",
        (
            Statement("constant 0.25", "end", "higher", "constant 0.05"),
            Statement("constant 0.25", "accuracy", "higher", "constant 0.05"),
        ),
    ),
    Claim(
        "C2",
        "On-policy, batch and group size barely move the entropy (section 4.3)",
        (
            Statement("(1,16,16,1)", "entropy", "same", _ON, STEPS),
            Statement("(1,8,8,1)", "entropy", "same", _ON, STEPS),
            Statement("group 4", "entropy", "same", _ON),
            Statement("group 16", "entropy", "same", _ON),
        ),
    ),
    Claim(
        "C3",
        "More SGD steps a rollout collapse the entropy; on-policy is best in the end (ablation 6)",
        (
            Statement(_TWO, "entropy", "lower", _ON),
            Statement(_FOUR, "entropy", "lower", _ON),
            Statement("(2,32,32,2)", "entropy", "lower", _ON),
            Statement("(4,32,32,4)", "entropy", "lower", _ON),
            Statement(_ON, "accuracy", "higher", _TWO),
            Statement(_ON, "accuracy", "higher", _FOUR),
        ),
    ),
    Claim(
        "C4",
        "The cause is off-policy data, not the small minibatch (ablation 7)",
        (
            Statement("(1,16,16,1)", "entropy", "higher", _TWO, STEPS),
            Statement("(1,8,8,1)", "entropy", "higher", _FOUR, STEPS),
            Statement("(1,8,8,1)", "entropy", "higher", _FOUR),
            Statement("(1,16,16,1)", "accuracy", "higher", _TWO),
            Statement("(1,8,8,1)", "accuracy", "higher", _FOUR),
        ),
        by="responses",
    ),
    Claim(
        "C5",
        "A larger rollout batch does not rescue many SGD steps",
        (
            Statement("(4,128,32,1)", "entropy", "lower", _ON, STEPS // 2),
            Statement("(4,128,32,1)", "entropy", "no higher", _FOUR, STEPS // 2),
        ),
    ),
    Claim(
        "C6",
        "A constant entropy coefficient decays or explodes (ablation 8)",
        (
            Statement("constant 0.005", "rise", "lower", None),
            Statement("constant 0.25", "rise", "higher", None),
            Statement("constant 0.5", "rise", "higher", None),
            Statement("constant 0.5", "accuracy", "lower", "constant 0.005"),
        ),
    ),
    Claim(
        "C8",
        "Adaptive control keeps the entropy of off-policy training, oscillating, and helps (ablation 9)",
        (
            Statement(_ADAPTIVE, "end", "higher", _FOUR),
            Statement(_ADAPTIVE, "swing", "higher", _FOUR),
            Statement(_ADAPTIVE, "accuracy", "higher", _FOUR),
        ),
    ),
    Claim(
        "C9",
        "Clip-higher: 0.25 and 0.265 keep the entropy, 0.28 only adds more (ablation 10)",
        (
            Statement("clip 0.25", "end", "higher", _FOUR),
            Statement("clip 0.265", "end", "higher", _FOUR),
            Statement("clip 0.28", "end", "higher", "clip 0.265"),
            Statement("clip 0.265", "accuracy", "higher", _FOUR),
            Statement("clip 0.28", "accuracy", "no higher", "clip 0.265"),
        ),
    ),
    Claim(
        "C10",
        "Temperature 1 keeps more entropy than 0.6: worse early, better finally (ablation 4)",
        (
            Statement("temperature 1", "entropy", "higher", "temperature 0.6"),
            Statement("temperature 1", "early", "lower", "temperature 0.6"),
            Statement("temperature 1", "accuracy", "higher", "temperature 0.6"),
        ),
    ),
    Claim(
        "C12",
        "Short context first: the same accuracy for fewer tokens (ablation 2)",
        (
            Statement("short, then long", "accuracy", "same", "temperature 1"),
            Statement("short, then long", "tokens", "lower", "temperature 1"),
        ),
    ),
    Claim(
        "C14",
        "Masking the advantages of truncated responses gains nothing at full length (ablation 3)",
        (
            Statement("mask before", "accuracy", "no higher", "no mask"),
            Statement("mask after", "accuracy", "no higher", "no mask"),
            Statement("mask before", "cut", "higher", "no mask"),
            Statement("mask before", "reward", "lower", "no mask"),
        ),
    ),
)
