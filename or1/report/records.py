"""Reading one record of metrics.jsonl: values that may be missing, and the evaluations in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from or1.config import StageConfig
from or1.core.records import AVG_KEY, Record, number
from or1.core.text import duration, value_text

PHASES = ("rollout", "reward", "train", "sync", "eval", "checkpoint")
_LINE = (
    (" reward {}", "reward/mean", "fixed3", 5),
    (" entropy {}", "policy/entropy", "fixed3", 5),
    ("coef {}", "policy/entropy_coef", "fixed4", 6),
    (" len {}", "completion/len_mean", "tokens", 3),
    ("cut {}", "completion/truncated", "percent0", 3),
    (" kept {}", "group/kept_share", "percent0", 3),
    (" grad {}", "optim/grad_norm", "short", 5),
    (" {} tok/s", "perf/tokens_per_s", "count", 5),
)

_FAILURES = ((" crash {}", "reward/status/crash"), (" timeout {}", "reward/status/timeout"))


def sampled(record: Record, stages: Sequence[StageConfig]) -> int:
    """Return how many responses a training step sampled; 0 if neither the record nor its stage tells."""
    if (count := number(record.get("completion/count"), -1.0)) >= 0:
        return round(count)
    index = record.get("stage")
    # Runs from before that metric: what the stage asks for, which refills and carried groups may differ from.
    known = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(stages)
    return stages[index].prompts_per_step * stages[index].group_size if known and record.get("step") != 0 else 0


def step_seconds(record: Record) -> float:
    """Wall time of a step: time/step covers every phase but the checkpoint, which is written after the record."""
    phases = [number(record.get(f"time/{phase}"), 0.0) for phase in PHASES]
    return max(number(record.get("time/step"), 0.0), math.fsum(phases[:-1])) + phases[-1]


def other_seconds(record: Record) -> float:
    """The part of a step's wall time that no phase claims."""
    return max(0.0, step_seconds(record) - math.fsum(number(record.get(f"time/{phase}"), 0.0) for phase in PHASES))


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation of one set, all values fractions; NaN where the run did not record one."""

    step: int
    avg: float
    ci95: float = math.nan
    pass_at_k: float = math.nan
    len_mean: float = math.nan
    truncated: float = math.nan
    reward: float = math.nan
    reward_ci95: float = math.nan


@dataclass(frozen=True)
class Course:
    """One number of an evaluation set from the first evaluation to the last; never empty.

    kind  how a value is written, see `or1.core.text.value_text`: percent for accuracy, fixed3 for a mean reward
    ci95  half width of the interval of the last value; NaN if it is not known
    """

    label: str
    kind: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    ci95: float = math.nan

    @property
    def first(self) -> str:
        """The first value as text."""
        return value_text(self.values[0], self.kind)

    @property
    def last(self) -> str:
        """The last value as text."""
        return value_text(self.values[-1], self.kind)

    @property
    def change(self) -> float | None:
        """Last value less the first, percentages in points; None while there is only one."""
        if len(self.values) == 1:
            return None
        return (self.values[-1] - self.values[0]) * (100 if self.kind == "percent" else 1)

    @property
    def change_text(self) -> str:
        """The change with its sign; empty while there is only one value."""
        if self.change is None:
            return ""
        sign = "-" if self.change < 0 else "+"
        if self.kind == "percent":
            return f"{sign}{abs(self.change):.1f} points"
        return sign + value_text(abs(self.change), self.kind)

    @property
    def start(self) -> str:
        """When the first value was taken: before training only if that was step 0."""
        return "before training" if self.steps[0] == 0 else f"at step {self.steps[0]}"


@dataclass(frozen=True)
class EvalHistory:
    """All evaluations of one set with k samples per problem, by step; never empty."""

    name: str
    k: int
    points: tuple[EvalPoint, ...]

    @property
    def before(self) -> EvalPoint:
        """The first evaluation."""
        return self.points[0]

    @property
    def after(self) -> EvalPoint | None:
        """The last evaluation, or None while there is only one."""
        return self.points[-1] if len(self.points) > 1 else None

    @property
    def change_points(self) -> float | None:
        """Accuracy gained, in percentage points."""
        return self.accuracy.change

    @property
    def accuracy(self) -> Course:
        """The share of responses that are solved."""
        last = self.points[-1]
        return Course(
            f"{self.name} avg@{self.k}",
            "percent",
            tuple(point.step for point in self.points),
            tuple(point.avg for point in self.points),
            last.ci95,
        )

    @property
    def mean_reward(self) -> Course | None:
        """The mean reward; None where no evaluation recorded one."""
        given = [point for point in self.points if math.isfinite(point.reward)]
        if not given:
            return None
        return Course(
            f"{self.name} reward",
            "fixed3",
            tuple(point.step for point in given),
            tuple(point.reward for point in given),
            given[-1].reward_ci95,
        )

    def courses(self, graded: bool) -> list[Course]:
        """What a person sees of this set, the leading number first; `graded` is `or1.reward.terms.graded_run`."""
        reward = self.mean_reward if graded else None
        return [self.accuracy] if reward is None else [reward, self.accuracy]


def eval_histories(records: Iterable[Record]) -> tuple[EvalHistory, ...]:
    """Every evaluation found in the records, by set, in order of first appearance."""
    points: dict[tuple[str, int], list[EvalPoint]] = {}
    for record in records:
        for key in record:
            match = AVG_KEY.fullmatch(key)
            if match is None or not math.isfinite(number(record[key])):
                continue
            name, k = match[1], int(match[2])
            names = (
                key,
                f"{key}_ci95",
                f"eval/{name}/pass@{k}",
                f"eval/{name}/len_mean",
                f"eval/{name}/truncated",
                f"eval/{name}/reward_mean",
                f"eval/{name}/reward_mean_ci95",
            )
            values = [number(record.get(n)) for n in names]
            points.setdefault((name, k), []).append(EvalPoint(record["step"], *values))
    return tuple(EvalHistory(name, k, tuple(found)) for (name, k), found in points.items())


def plain_line(record: Record, step: int, total: int, left: float | None) -> str:
    """One step as one line of at most about 120 columns; values the record lacks are left out."""
    cells = [f"step {step:>{len(str(total))}}/{total}"]
    for words, key, kind, width in _LINE:
        value = number(record.get(key))
        if math.isfinite(value):
            cells.append(words.format(value_text(value, kind).rjust(width)))
    for words, key in _FAILURES:
        if (share := number(record.get(key), 0.0)) > 0:
            cells.append(words.format(value_text(share, "percent")))
    if left is not None and step < total:
        cells.append(f" left {duration(left).replace(' ', '')}")
    return " ".join(cells)
