"""The search: check every candidate once, then time the correct ones in interleaved rounds and halve their number.

The clock decides how much is measured, never how a result is judged: what the budget does not allow is not tried, and
the untuned default stays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from or1.tune.choice import Trial

# A candidate's error may be this many times that of plain torch in the same dtype.
MOST_ERROR = 2.0
# The default is kept unless another candidate needs at most this share of its time: a smaller gain is noise.
_GAIN = 0.98
_RUNS_A_ROUND, _MOST_ROUNDS = 3, 6
# Most seconds of a candidate's first run, which may compile, and of a later run.
FIRST_LIMIT_S, RUN_LIMIT_S = 20.0, 10.0
FIRST_SHARE = 0.25
"""Share of the budget that a first run may take, if that is more."""
# A run may take this many times its usual time before it counts as hanging, and at least these seconds.
_PATIENCE, _LEAST_LIMIT_S = 20.0, 2.0

Values = dict[str, str | int]


class CandidateError(Exception):
    """Reason why a candidate is thrown out."""


class Runner(Protocol):
    """What runs a candidate: `or1.tune.process.Child`, or a test's own."""

    def prepare(self, group: str, limit_s: float) -> None:
        """Make the inputs and the exact results of a group. Raises CandidateError."""
        ...

    def check(self, group: str, options: Values, limit_s: float) -> float:
        """Run once, and return the error in units of plain torch's. Raises CandidateError."""
        ...

    def seconds(self, group: str, options: Values, limit_s: float) -> float:
        """Return the seconds of one run. Raises CandidateError."""
        ...


@dataclass(frozen=True)
class Candidate:
    """One way to compute a group: its name in the table, and the values that the choice gets if it is chosen."""

    name: str
    values: Values


Candidates = Callable[[str, Values], Sequence[Candidate]]
"""Function from a group and the values chosen so far to the candidates; the first is the default."""


@dataclass
class Budget:
    """Seconds of a tuning. `progress` is called with (seconds spent, seconds in all)."""

    seconds: float
    progress: Callable[[int, int], None]
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._began = self.clock()

    @property
    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self._began + self.seconds - self.clock())

    def tick(self) -> None:
        """Show how much was spent."""
        self.progress(round(self.seconds - self.left), math.ceil(self.seconds))


def search(
    groups: Sequence[str], candidates: Candidates, runner: Runner, budget: Budget, *, all_groups: bool = False
) -> tuple[list[Trial], Values]:
    """Choose a candidate of every group in order; return all trials and the chosen values.

    all_groups  measure a group with a single candidate too, for its rate
    """
    trials: list[Trial] = []
    chosen: Values = {}
    for number, group in enumerate(groups):
        found = candidates(group, dict(chosen))
        if len(found) < (1 if all_groups else 2):
            continue
        tried = [Trial(group, each.name, chosen | each.values) for each in found]
        if _prepared(group, tried, runner, budget):
            # What a group leaves over is shared by the groups after it.
            share = budget.left / (len(groups) - number)
            _choose(tried, runner, _Share(budget, budget.left - share))
        best = next((index for index, trial in enumerate(tried) if trial.chosen), 0)
        chosen |= found[best].values
        trials += tried
    budget.progress(math.ceil(budget.seconds), math.ceil(budget.seconds))
    return trials, chosen


@dataclass
class _Share:
    """The seconds of one group: all of the budget but `kept`."""

    budget: Budget
    kept: float

    @property
    def left(self) -> float:
        return max(0.0, self.budget.left - self.kept)


def _prepared(group: str, trials: Sequence[Trial], runner: Runner, budget: Budget) -> bool:
    """Make the inputs of a group, before the first candidate, so that no candidate's limit includes this."""
    try:
        if budget.left > 0:
            runner.prepare(group, budget.left)
    except CandidateError as error:
        for trial in trials:
            trial.why_out = f"not tried: its inputs could not be made: {error}"
        return False
    return True


def _choose(trials: list[Trial], runner: Runner, share: _Share) -> None:
    """Check and time the candidates of a group, and mark at most one as chosen."""
    for trial in trials:
        _check(trial, runner, share)
    alive = [trial for trial in trials if not trial.why_out]
    for _ in range(_MOST_ROUNDS):
        if not _round(alive, runner, share):
            break
        alive = _halve([trial for trial in alive if not trial.why_out])
        if len(alive) < 2 and all(len(trial.seconds) >= _RUNS_A_ROUND for trial in alive):
            break
    _mark(trials, [trial for trial in alive if not trial.why_out])
    for trial in trials:
        if not (trial.why_out or trial.chosen):
            trial.why_out = f"too little time: the budget of {share.budget.seconds:g} s was spent"


def _check(trial: Trial, runner: Runner, share: _Share) -> None:
    """Run a candidate for the first time, and throw it out if that fails or its result is wrong."""
    # A longer budget is meant for candidates that compile for long.
    limit = min(max(FIRST_LIMIT_S, FIRST_SHARE * share.budget.seconds), share.budget.left)
    if min(limit, share.left) <= 0:
        trial.why_out = f"not tried: the budget of {share.budget.seconds:g} s was spent"
        return
    began = share.budget.left
    try:
        trial.error = runner.check(trial.group, trial.options, limit)
    except CandidateError as error:
        trial.why_out = _why(error, share.budget)
    else:
        trial.first_s = began - share.budget.left
        if not trial.error <= MOST_ERROR:
            trial.why_out = f"wrong: its error is {trial.error:.3g} times plain torch's, the limit is {MOST_ERROR:g}"
    share.budget.tick()


def _round(alive: Sequence[Trial], runner: Runner, share: _Share) -> bool:
    """Time every candidate some times, in turn, so that a slow moment hits all. Return False if the time is spent."""
    for _ in range(_RUNS_A_ROUND):
        for trial in alive:
            if trial.why_out:
                continue
            # A run that would not end in time is not begun, since it could only be ended with its process.
            usual = trial.best if trial.seconds else trial.first_s
            if share.left <= usual:
                return False
            limit = min(RUN_LIMIT_S, share.budget.left, max(share.left, _PATIENCE * usual, _LEAST_LIMIT_S))
            try:
                trial.seconds.append(runner.seconds(trial.group, trial.options, limit))
            except CandidateError as error:
                trial.why_out = _why(error, share.budget)
            share.budget.tick()
    return True


def _why(error: CandidateError, budget: Budget) -> str:
    """Return why a candidate is out; one that the end of the budget cut off has not failed."""
    return str(error) if budget.left > 0 else f"too little time: the budget of {budget.seconds:g} s was spent"


def _halve(alive: list[Trial]) -> list[Trial]:
    """Throw out the slower half, except candidates whose best run is as fast as the leader: they may only be noisy."""
    alive = sorted(alive, key=lambda trial: trial.median)
    kept = []
    for place, trial in enumerate(alive):
        if place >= math.ceil(len(alive) / 2) and trial.best > alive[0].median:
            trial.why_out = _slower(trial, alive[0])
        else:
            kept.append(trial)
    return kept


def _slower(trial: Trial, leader: Trial) -> str:
    return f"slower: {trial.median / leader.median:.2f} times the best"


def _mark(trials: Sequence[Trial], alive: Sequence[Trial]) -> None:
    """Mark the chosen trial: the fastest, or the default if the fastest is not clearly faster."""
    timed = [trial for trial in alive if trial.seconds]
    default = trials[0]
    if not timed:
        return
    fastest = min(timed, key=lambda trial: trial.median)
    winner = fastest if default.failed or _clearly_faster(fastest, default) else default
    winner.chosen, winner.why_out = True, ""
    for trial in timed:
        if not trial.chosen and not trial.why_out:
            trial.why_out = _slower(trial, fastest) if trial.median > fastest.median else "no clear gain"


def _clearly_faster(trial: Trial, default: Trial) -> bool:
    """Return whether the median and the best run of enough runs are better than those of the default."""
    if min(len(trial.seconds), len(default.seconds)) < _RUNS_A_ROUND:
        return False
    return trial.median < _GAIN * default.median and trial.best < _GAIN * default.best
