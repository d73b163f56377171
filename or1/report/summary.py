"""The one summary at the end of a run, read back from what the run wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence

from or1.config import Config
from or1.core.records import Record, number
from or1.core.types import Status
from or1.magic.empty_steps import nothing_trained
from or1.report.records import PHASES, Course, eval_histories, other_seconds, sampled, step_seconds
from or1.report.summary_text import Summary
from or1.reward.terms import NO_THINK_CLOSE, graded_run, no_think_close
from or1.run.metrics_log import read_metrics
from or1.run.state import TrainState


def summarise(
    config: Config, state: TrainState, bad_rows: int, *, report: str | None = None, weights: str | None = None
) -> Summary:
    """All steps of the run, those before a resume included."""
    records = read_metrics(config.run_path / "metrics.jsonl")
    phases = {phase: math.fsum(number(r.get(f"time/{phase}"), 0.0) for r in records) for phase in PHASES}
    phases["other"] = math.fsum(other_seconds(r) for r in records)
    counts = {
        "truncated responses": _count([(record, record.get("completion/truncated")) for record in records], config),
        "aborted at the deadline": state.totals["stragglers"],
        "reward timeouts": state.totals[Status.TIMEOUT.value],
        "reward crashes": state.totals[Status.CRASH.value],
        "rewards that were None": state.totals[Status.SKIPPED.value],
        "skipped updates": state.totals["skipped_updates"],
        "empty steps": state.totals["empty_steps"],
        "bad data rows": bad_rows,
        "solved prompts dropped": len(state.solved.dropped),
    }
    if unclosed := _count([(record, no_think_close(record)) for record in records], config):
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
        # Stages that ended early took fewer steps than they might have.
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
    )


def _count(shares: Sequence[tuple[Record, object]], config: Config) -> int:
    """Training responses behind a share of each step, over the whole run; `or1 report` counts them alike."""
    return round(math.fsum(number(share, 0.0) * sampled(record, config.stage) for record, share in shares))


def _training_reward(records: Sequence[Record]) -> Course | None:
    given = [(record["step"], mean) for record in records if math.isfinite(mean := number(record.get("reward/mean")))]
    if not given:
        return None
    steps, means = zip(*given, strict=True)
    return Course("training reward", "fixed3", steps, means)
