"""Numbers of a run that statements compare, and the manipulation checks of the claims.

A record has the series of a run at equally spaced rollouts, the start included; see `tabular.train`. An arm with
`times` times the rollouts has the same number of points, further apart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.paper.arms import ARMS

Record = Mapping[str, Any]

MIDDLE = 0.3  # of the run: after this share, entropy is compared
_EARLY = 0.15
_LAST = 0.75  # what comes after this share of the run is its end


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    least   smallest relevant difference, d
    margin  a seed is won by more than this
    log     the number is a logarithm, so a difference is a ratio
    """

    words: str
    of: Callable[[Record], float]
    least: float
    margin: float = 0.0
    log: bool = False


def at(record: Record, name: str, share: float) -> float:
    """Return the value of a series after this share of the run."""
    values = record["series"][name]
    return float(values[round(share * (len(values) - 1))])


def over(record: Record, name: str, first: float, last: float) -> float:
    """Return the mean of the points after share `first` of the run, up to and with share `last`."""
    values = record["series"][name]
    points = len(values) - 1
    return statistics.fmean(values[round(first * points) + 1 : round(last * points) + 1])


def _swing(record: Record) -> float:
    """Return log of the standard deviation of log entropy about its regression line after the middle."""
    values = record["series"]["entropy"]
    logs = [math.log(x) for x in values[round(MIDDLE * (len(values) - 1)) :]]
    slope, start = statistics.linear_regression(range(len(logs)), logs)
    return math.log(statistics.pstdev(y - start - slope * x for x, y in enumerate(logs)))


def _log(name: str, share: float) -> Callable[[Record], float]:
    return lambda record: math.log(at(record, name, share))


def _by_rollouts(share: float) -> Callable[[Record], float]:
    return lambda record: math.log(at(record, "entropy", share / ARMS[record["arm"]].times))


def _final_by_rollouts(record: Record) -> float:
    times = ARMS[record["arm"]].times
    return over(record, "accuracy", _LAST / times, 1 / times)


_D = math.log(1.25)
_ACCURACY = 0.03

MEASURES: dict[str, Measure] = {
    "entropy": Measure("entropy after 30 % of the run", _log("entropy", MIDDLE), _D, log=True),
    "entropy by rollouts": Measure("entropy after 120 rollouts", _by_rollouts(MIDDLE), _D, log=True),
    "end entropy": Measure("entropy at the end", _log("entropy", 1.0), _D, log=True),
    "rise": Measure(
        "entropy at the end against the start",
        lambda r: math.log(at(r, "entropy", 1.0) / at(r, "entropy", 0.0)),
        math.log(2),
        log=True,
    ),
    "swing": Measure("swing of entropy about its trend", _swing, _D, log=True),
    "early": Measure("accuracy after 15 % of the run", lambda r: at(r, "accuracy", _EARLY), _ACCURACY),
    "accuracy": Measure(
        "accuracy in the last quarter", lambda r: over(r, "accuracy", _LAST, 1.0), _ACCURACY, margin=0.05
    ),
    "accuracy by rollouts": Measure("accuracy in rollouts 301 to 400", _final_by_rollouts, _ACCURACY, margin=0.05),
}


Records = Mapping[tuple[str, int], Record]


@dataclass(frozen=True)
class Check:
    """Outcome of a manipulation check, with the figure that shows it."""

    passed: bool
    text: str


def of_arm(records: Records, arm: str) -> list[Record]:
    """Return the runs of an arm in order of the seeds. Raises KeyError for an arm without runs."""
    found = [records[key] for key in sorted(records) if key[0] == arm]
    if not found:
        raise KeyError(f"no run of arm {arm}")
    return found


def _geometric(records: Sequence[Record], share: float) -> float:
    return math.exp(statistics.fmean(math.log(at(r, "entropy", share)) for r in records))


def learns(records: Records, arm: str = "(1,64,64,1)") -> Check:
    """Check that there is something to learn: accuracy rises by at least 0.3."""
    runs = of_arm(records, arm)
    rise = statistics.fmean(at(r, "accuracy", 1.0) - at(r, "accuracy", 0.0) for r in runs)
    return Check(rise >= 0.3, f"accuracy of {arm} rises by {rise:.2f}; needed: at least 0.30")


def falls(records: Records, arm: str = "(1,64,64,1)") -> Check:
    """Check that entropy moves in the reference arm, so that sameness says something."""
    runs = of_arm(records, arm)
    share = _geometric(runs, 1.0) / _geometric(runs, 0.0)
    return Check(share < 0.5, f"entropy of {arm} ends at {share:.1%} of its start; needed: below 50 %")


def collapses(records: Records, arm: str, reference: str = "(1,64,64,1)") -> Check:
    """Check that the arm's entropy collapses early, and that the on-policy arm has come to its end."""
    runs, flat = of_arm(records, arm), of_arm(records, reference)
    share = _geometric(runs, MIDDLE) / _geometric(runs, 0.0)
    gain = statistics.fmean(at(r, "accuracy", 1.0) - at(r, "accuracy", _LAST) for r in flat)
    return Check(
        share < 0.25 and gain < 0.01,
        f"after 30 % of the run entropy of {arm} is {share:.1%} of its start (needed: below 25 %), and in its last "
        f"quarter {reference} gains {gain:.4f} accuracy (needed: below 0.0100)",
    )


def clips(records: Records, arm: str) -> Check:
    """Check that the clip acts in the base arm."""
    share = statistics.fmean(over(r, "clipped", 0.0, 1.0) for r in of_arm(records, arm))
    return Check(0.003 <= share <= 0.05, f"{share:.2%} of tokens are clipped in {arm}; needed: 0.3 to 5 %")


def bonus_before_decision(record: Record) -> float:
    """Return the share of rollouts with a bonus before the top rung is lost or climbed.

    Lost: its probability is below a tenth of that at the start. Climbed: above 0.05.
    """
    top = record["series"]["top"]
    decided = (i for i, p in enumerate(top) if p < top[0] / 10 or p > 0.05)
    until = max(next(decided, len(top) - 1), 1)
    return statistics.fmean(record["series"]["bonus"][:until])


def controls(records: Records, arm: str) -> Check:
    """Check that the controller is on before the top rung is decided."""
    share = statistics.fmean(bonus_before_decision(r) for r in of_arm(records, arm))
    return Check(
        share >= 0.5,
        f"bonus on in {share:.0%} of rollouts of {arm} before the top rung is lost or climbed; needed: at least 50 %",
    )


def keeps(records: Records, arm: str, base: str) -> Check:
    """Check that the arm has more entropy than the base at the same rollout."""
    ratio = _geometric(of_arm(records, arm), MIDDLE) / _geometric(of_arm(records, base), MIDDLE)
    return Check(ratio >= 1.3, f"entropy of {arm} after 30 % of the run is x{ratio:.2f} that of {base}; needed: x1.30")


def spans(records: Records, arms: Sequence[str]) -> Check:
    """Check that constant coefficients span decay and growth."""
    shares = {a: _geometric(of_arm(records, a), 1.0) / _geometric(of_arm(records, a), 0.0) for a in arms}
    low, high = min(shares.values()), max(shares.values())
    return Check(
        low < 0.25 and high > 1,
        f"entropy at the end is {low:.1%} to {high:.1%} of the start; needed: from below 25 % to above 100 %",
    )


def ranges(records: Records, arms: Sequence[str]) -> Check:
    """Check that the arms differ in entropy."""
    middle = [_geometric(of_arm(records, a), MIDDLE) for a in arms]
    ratio = max(middle) / min(middle)
    return Check(ratio >= 3, f"entropies of the arms after 30 % of the run span x{ratio:.1f}; needed: x3.0")
