"""Reading one record of metrics.jsonl: values that may be missing, and the evaluations in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from or1.humanize import duration, value_text

PHASES = ("rollout", "reward", "train", "sync", "eval", "checkpoint")
AVG_KEY = re.compile(r"eval/([^/]+)/avg@(\d+)")
_LINE = (
    (" reward {}", "reward/mean", "fixed3", 5), (" entropy {}", "policy/entropy", "fixed3", 5),
    ("coef {}", "policy/entropy_coef", "fixed4", 6), (" len {}", "completion/len_mean", "tokens", 3),
    ("cut {}", "completion/truncated", "percent0", 3), (" kept {}", "group/kept_share", "percent0", 3),
    (" grad {}", "optim/grad_norm", "short", 5), (" {} tok/s", "perf/tokens_per_s", "count", 5),
)  # fmt: skip

_FAILURES = ((" crash {}", "reward/status/crash"), (" timeout {}", "reward/status/timeout"))

Record = Mapping[str, Any]


def number(value: object, default: float = math.nan) -> float:
    """A metric as a float; `default` for anything missing, not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return default
    try:
        result = float(value)
    except OverflowError:
        return default
    return result if math.isfinite(result) else default


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
        return None if self.after is None else 100 * (self.after.avg - self.before.avg)


def eval_histories(records: Iterable[Record]) -> tuple[EvalHistory, ...]:
    """Every evaluation found in the records, by set, in order of first appearance."""
    points: dict[tuple[str, int], list[EvalPoint]] = {}
    for record in records:
        for key in record:
            match = AVG_KEY.fullmatch(key)
            if match is None or not math.isfinite(number(record[key])):
                continue
            name, k = match[1], int(match[2])
            names = (key, f"{key}_ci95", f"eval/{name}/pass@{k}", f"eval/{name}/len_mean", f"eval/{name}/truncated")
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
