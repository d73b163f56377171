"""The summary at the end of a run, computed from the files that the run wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from or1.config import Config
from or1.core.metric_names import metric
from or1.core.records import Record, number
from or1.core.text import duration
from or1.core.types import Status
from or1.data.unverifiable import unverifiable_text
from or1.magic.empty_steps import nothing_trained
from or1.report.console import default_console, print_pairs, safe
from or1.report.records import PHASES, Course, EvalHistory, eval_histories, other_seconds, sampled, step_seconds
from or1.reward.terms import NO_THINK_CLOSE, graded_run, no_think_close
from or1.run.metrics_log import read_metrics
from or1.run.state import TrainState

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_BAR = 30  # characters of an accuracy bar


@dataclass(frozen=True)
class Summary:
    """The values that `print_summary` prints.

    wall_s   seconds of all steps
    phase_s  seconds by phase
    counts   events by name, such as truncated responses and skipped updates; most of them are problems
    graded   see `or1.reward.terms`
    reward   mean training reward of the steps that recorded a reward; None if no step did
    remark   the most important warning; empty if there is none
    unverifiable  problems whose gold answers the verifier cannot read
    """

    evals: tuple[EvalHistory, ...]
    steps_done: int
    total_steps: int
    wall_s: float
    run_dir: str
    phase_s: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    report_path: str | None = None
    weights_path: str | None = None
    graded: bool = False
    reward: Course | None = None
    remark: str = ""
    unverifiable: int = 0


def summarise(
    config: Config, state: TrainState, bad_rows: int, *, report: str | None = None, weights: str | None = None
) -> Summary:
    """Return the summary of all steps of the run, including the steps before a resume.

    bad_rows         unusable rows in the data files
    report, weights  paths to print
    """
    records = read_metrics(config.run_path / "metrics.jsonl")
    phases = {phase: math.fsum(number(r.get(f"time/{phase}"), 0.0) for r in records) for phase in PHASES}
    phases["other"] = math.fsum(other_seconds(r) for r in records)
    counts = {
        "truncated responses": _count(records, [record.get("completion/truncated") for record in records], config),
        "aborted at the deadline": state.totals["stragglers"],
        "reward timeouts": state.totals[Status.TIMEOUT.value],
        "reward crashes": state.totals[Status.CRASH.value],
        "rewards that were None": state.totals[Status.SKIPPED.value],
        "skipped updates": state.totals["skipped_updates"],
        "empty steps": state.totals["empty_steps"],
        "bad data rows": bad_rows,
        "solved prompts dropped": len(state.solved.dropped),
    }
    if unclosed := _count(records, [no_think_close(record) for record in records], config):
        counts[f"responses with {NO_THINK_CLOSE}"] = unclosed
    in_evaluations = {"crashes in evaluations": "eval_crashes", "timeouts in evaluations": "eval_timeouts"}
    counts |= {name: state.totals[key] for name, key in in_evaluations.items() if state.totals[key]}
    if state.totals["graded_truncated"]:
        counts["truncated responses that were graded"] = state.totals["graded_truncated"]
    if state.totals["changed_inputs"]:
        counts["inputs that changed on resuming"] = state.totals["changed_inputs"]
    return Summary(
        evals=eval_histories(records),
        steps_done=state.step,
        # Stages that ended early took fewer steps than the config allows.
        total_steps=state.step if state.stages.finished else config.total_steps,
        wall_s=math.fsum(step_seconds(r) for r in records),
        run_dir=config.run_dir,
        phase_s={phase: seconds for phase, seconds in phases.items() if seconds > 0},
        counts=counts,
        report_path=report,
        weights_path=weights,
        graded=graded_run(records),
        reward=_training_reward(records),
        remark=nothing_trained(records),
        unverifiable=len(state.unverifiable.ids),
    )


def _count(records: Sequence[Record], shares: Sequence[object], config: Config) -> int:
    """Return the number of training responses in a share of each step, as `RecordedRun.count` does."""
    pairs = zip(records, shares, strict=True)
    return round(math.fsum(number(share, 0.0) * sampled(record, config.stage) for record, share in pairs))


def _training_reward(records: Sequence[Record]) -> Course | None:
    given = [(record["step"], mean) for record in records if math.isfinite(mean := number(record.get("reward/mean")))]
    if not given:
        return None
    steps, means = zip(*given, strict=True)
    return Course("training reward", metric("reward/mean").kind, steps, means)


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print evaluations and training reward at start and end, times, counts and the paths of the results."""
    from rich.text import Text

    console = console or default_console()
    done = f"{summary.steps_done} of {summary.total_steps} steps in {duration(summary.wall_s)}"
    head = "Run finished" if summary.steps_done >= summary.total_steps else "Run stopped"
    console.print(Text(f"\n{head}: {done}", style="bold"), soft_wrap=True)
    if summary.remark:
        console.print(safe(summary.remark, console, "bold red"), soft_wrap=True)
    courses = [course for history in summary.evals for course in history.courses(summary.graded)]
    reward = [] if summary.reward is None else [summary.reward]
    width = max((len(course.label) for course in courses + reward), default=0)
    for course in courses:
        console.print(_course_line(course, width, console, "no later evaluation"), soft_wrap=True)
    for course in reward:
        console.print(_course_line(course, width, console, "no later step"), soft_wrap=True)
    lines = []
    if summary.phase_s:
        total = math.fsum(summary.phase_s.values()) or 1.0
        spent = sorted(summary.phase_s.items(), key=lambda item: -item[1])
        lines.append(("time", ", ".join(f"{name} {duration(s)} ({100 * s / total:.0f} %)" for name, s in spent)))
    if some := {name: n for name, n in summary.counts.items() if n}:
        lines.append(("counts", ", ".join(f"{n:,} {name}" for name, n in some.items())))
    if none := [name for name, n in summary.counts.items() if not n]:
        lines.append(("none of", ", ".join(none)))
    if summary.unverifiable:
        lines.append(("answers", unverifiable_text(summary.unverifiable)))
    paths = {"run": summary.run_dir, "report": summary.report_path, "weights": summary.weights_path}
    lines += [(name, path) for name, path in paths.items() if path is not None]
    print_pairs(lines, console)


def _course_line(course: Course, width: int, console: Console, only: str) -> Text:
    """Return name, bar from 0 to 100 % (for accuracies), first -> last value, and change.

    only  text after a single value
    """
    line = safe("  " + course.label.ljust(max(width, 10)) + "  ", console)
    if course.kind == "percent":
        _append_bar(line, course.values[0], course.values[-1], console)
    if course.change is None:
        return line.append(f"{course.first}, {only}")
    line.append(f"{course.first} -> ").append(course.last, style="bold")
    line.append(f"  {course.change_text}", style="green" if course.change > 0 else "red" if course.change < 0 else "")
    if course.steps[0] > 0:
        line.append(f"  steps {course.steps[0]} to {course.steps[-1]}", style="dim")
    return line


def _append_bar(line: Text, before: float, last: float, console: Console) -> None:
    full, gained, lost, empty = "#+-." if console.options.ascii_only else "\u2588\u2593\u2592\u2591"
    low, high = (round(_BAR * min(max(value, 0), 1)) for value in sorted((before, last)))
    line.append(full * low, style="blue")
    line.append((gained if last >= before else lost) * (high - low), style="green" if last >= before else "red")
    line.append(empty * (_BAR - high), style="dim")
    line.append("  ")
