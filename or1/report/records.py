"""What the records of metrics.jsonl say: phases of a step, evaluations, and the plain line of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from or1.config import StageConfig
from or1.core.metric_names import metric
from or1.core.records import AVG_KEY, Record, number
from or1.core.text import duration, value_text

PHASES = ("rollout", "reward", "train", "sync", "eval", "checkpoint")
# Words, metric, columns of the value, and a shorter style than the metric's own.
_LINE = (
    (" reward {}", "reward/mean", 5, ""),
    (" entropy {}", "policy/entropy", 5, ""),
    ("coef {}", "policy/entropy_coef", 6, ""),
    (" len {}", "completion/len_mean", 3, "tokens"),
    ("cut {}", "completion/truncated", 3, "percent0"),
    (" kept {}", "group/kept_share", 3, "percent0"),
    (" grad {}", "optim/grad_norm", 5, ""),
    (" {} tok/s", "perf/tokens_per_s", 5, ""),
)

_FAILURES = ((" crash {}", "reward/status/crash"), (" timeout {}", "reward/status/timeout"))


def sampled(record: Record, stages: Sequence[StageConfig]) -> int:
    """Return the number of responses that a training step sampled; 0 if neither record nor stage is known."""
    if (count := number(record.get("completion/count"), -1.0)) >= 0:
        return round(count)
    index = record.get("stage")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(stages) or record.get("step") == 0:
        return 0
    # Runs older than completion/count: the number that the stage asks for. Refills and carried groups may change it.
    return stages[index].prompts_per_step * stages[index].group_size


def step_seconds(record: Record) -> float:
    """Return the wall time of a step. time/step excludes the checkpoint, which is written after the record."""
    phases = [number(record.get(f"time/{phase}"), 0.0) for phase in PHASES]
    return max(number(record.get("time/step"), 0.0), math.fsum(phases[:-1])) + phases[-1]


def other_seconds(record: Record) -> float:
    """Return the wall time of a step minus the time of its phases."""
    return max(0.0, step_seconds(record) - math.fsum(number(record.get(f"time/{phase}"), 0.0) for phase in PHASES))


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation of one set. A value that the run did not record is NaN.

    avg, pass_at_k, truncated  shares; ci95, reward_ci95 half widths of 95 % intervals; len_mean in tokens
    """

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
    """The values of one number over a run, with at least one value.

    kind  style of a value, see `or1.core.text.value_text`: percent for accuracy, fixed3 for a mean reward
    ci95  half width of the interval of the last value; NaN if unknown
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
        """The last value minus the first, in points if `kind` is percent; None for a single value."""
        if len(self.values) == 1:
            return None
        return (self.values[-1] - self.values[0]) * (100 if self.kind == "percent" else 1)

    @property
    def change_text(self) -> str:
        """The change with its sign; empty for a single value."""
        if self.change is None:
            return ""
        sign = "-" if self.change < 0 else "+"
        if self.kind == "percent":
            return f"{sign}{abs(self.change):.1f} points"
        return sign + value_text(abs(self.change), self.kind)

    @property
    def start(self) -> str:
        """When the first value was taken: "before training" for step 0."""
        return "before training" if self.steps[0] == 0 else f"at step {self.steps[0]}"


@dataclass(frozen=True)
class EvalHistory:
    """All evaluations of one set with k samples per problem, by step; never empty."""

    name: str
    k: int
    points: tuple[EvalPoint, ...]

    @property
    def accuracy(self) -> Course:
        """The share of responses that are solved."""
        last = self.points[-1]
        return Course(
            label=f"{self.name} avg@{self.k}",
            kind="percent",
            steps=tuple(point.step for point in self.points),
            values=tuple(point.avg for point in self.points),
            ci95=last.ci95,
        )

    @property
    def mean_reward(self) -> Course | None:
        """The mean reward; None if no evaluation recorded a mean reward."""
        given = [point for point in self.points if math.isfinite(point.reward)]
        if not given:
            return None
        return Course(
            label=f"{self.name} reward",
            kind="fixed3",
            steps=tuple(point.step for point in given),
            values=tuple(point.reward for point in given),
            ci95=given[-1].reward_ci95,
        )

    def courses(self, graded: bool) -> list[Course]:
        """Return the numbers to show, the most important first. A graded run shows the mean reward before accuracy.

        graded  see `or1.reward.terms.graded_run`
        """
        reward = self.mean_reward if graded else None
        return [self.accuracy] if reward is None else [reward, self.accuracy]


def eval_histories(records: Iterable[Record]) -> tuple[EvalHistory, ...]:
    """Return all evaluations in the records, by set, in order of first appearance."""
    points: dict[tuple[str, int], list[EvalPoint]] = {}
    for record in records:
        for key in record:
            match = AVG_KEY.fullmatch(key)
            if match is None or not math.isfinite(number(record[key])):
                continue
            name, k = match[1], int(match[2])
            point = EvalPoint(
                step=record["step"],
                avg=number(record[key]),
                ci95=number(record.get(f"{key}_ci95")),
                pass_at_k=number(record.get(f"eval/{name}/pass@{k}")),
                len_mean=number(record.get(f"eval/{name}/len_mean")),
                truncated=number(record.get(f"eval/{name}/truncated")),
                reward=number(record.get(f"eval/{name}/reward_mean")),
                reward_ci95=number(record.get(f"eval/{name}/reward_mean_ci95")),
            )
            points.setdefault((name, k), []).append(point)
    return tuple(EvalHistory(name, k, tuple(found)) for (name, k), found in points.items())


def plain_line(record: Record, step: int, total: int, left: float | None) -> str:
    """Return one step as one line of at most about 120 columns. Missing values are left out.

    left  estimated seconds to the end of the run; None if unknown
    """
    cells = [f"step {step:>{len(str(total))}}/{total}"]
    for words, key, width, shorter in _LINE:
        value = number(record.get(key))
        if math.isfinite(value):
            cells.append(words.format(value_text(value, shorter or metric(key).kind).rjust(width)))
    for words, key in _FAILURES:
        if (share := number(record.get(key), 0.0)) > 0:
            cells.append(words.format(value_text(share, metric(key).kind)))
    if left is not None and step < total:
        cells.append(f" left {duration(left).replace(' ', '')}")
    return " ".join(cells)
