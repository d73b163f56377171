"""The one summary at the end of a run, read back from what the run wrote."""

from __future__ import annotations

import math

from or1.config import Config
from or1.display import Summary
from or1.empty_steps import nothing_trained
from or1.metrics import read_metrics
from or1.records import PHASES, eval_histories, number, other_seconds, step_seconds
from or1.run_state import TrainState
from or1.types import Status


def summarise(
    config: Config, state: TrainState, bad_rows: int, *, report: str | None = None, weights: str | None = None
) -> Summary:
    """All steps of the run, those before a resume included."""
    records = read_metrics(config.run_path / "metrics.jsonl")
    phases = {phase: math.fsum(number(r.get(f"time/{phase}"), 0.0) for r in records) for phase in PHASES}
    phases["other"] = math.fsum(other_seconds(r) for r in records)
    counts = {
        "truncated responses": state.totals[Status.TRUNCATED.value] + state.totals["graded_truncated"],
        "aborted at the deadline": state.totals["stragglers"],
        "reward timeouts": state.totals[Status.TIMEOUT.value],
        "reward crashes": state.totals[Status.CRASH.value],
        "rewards that were None": state.totals[Status.SKIPPED.value],
        "skipped updates": state.totals["skipped_updates"],
        "empty steps": state.totals["empty_steps"],
        "bad data rows": bad_rows,
        "solved prompts dropped": len(state.solved.dropped),
    }
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
        total_steps=state.step if state.stages.finished(config) else config.total_steps,
        wall_s=math.fsum(step_seconds(r) for r in records),
        run_dir=config.run_dir,
        phase_s={phase: seconds for phase, seconds in phases.items() if seconds > 0},
        counts=counts,
        report_path=report,
        weights_path=weights,
        remark=nothing_trained(records),
    )
