"""What a scheduler's limits mean for a run: the grace that a stop needs, and checkpoints that a job never reaches.

After SIGTERM a rollout ends at once and is kept. What follows the rollout in a step continues to the end of the step,
and a checkpoint is written. That is the grace which a run needs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from or1.config import Config
from or1.core.errors import Or1Error
from or1.core.text import duration
from or1.plan.devices import find_device
from or1.plan.estimate import Plan, make_plan
from or1.plan.rates import measured
from or1.plan.shapes import shape_of
from or1.run.metrics_log import read_metrics

DEFAULT_GRACE_S = 900
# The write of a checkpoint, and the least grace: the first steps of a run are often slower than the plan.
_WRITE_S, _LEAST_S = 180, 300
_MARGIN = 1.25
# Measured steps that are looked at, so that an evaluation is likely to be among them.
_RECENT = 50


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step.

    name   where the seconds come from, for a person
    whole  of the whole step
    after  of what follows the rollout: training, the push of weights, an evaluation
    """

    name: str
    whole: float
    after: float


@dataclass(frozen=True)
class JobLimits:
    """Limits of a scheduler.

    job_s    seconds that a job lasts; None: unknown or unlimited
    grace_s  seconds between SIGTERM and the end
    """

    job_s: float | None = None
    grace_s: float = DEFAULT_GRACE_S

    @classmethod
    def found(
        cls, hours: float | None, grace_s: float | None, environment: Mapping[str, str] = os.environ
    ) -> JobLimits:
        """Return the limits of the options, else those of the SLURM job that this process is in."""
        job_s = None if hours is None else 3600 * hours
        if job_s is None:
            start, end = (_number(environment.get(f"SLURM_JOB_{name}_TIME")) for name in ("START", "END"))
            job_s = end - start if start is not None and end is not None and end > start else None
        return cls(job_s, DEFAULT_GRACE_S if grace_s is None else grace_s)


def measured_step(run_dir: Path) -> StepSeconds | None:
    """Return the longest of the last steps in metrics.jsonl, with their evaluations; None before the first step."""
    records = [r for r in read_metrics(run_dir / "metrics.jsonl")[-_RECENT:] if r["step"] > 0]
    times = [(_number(r.get("time/step")), _number(r.get("time/rollout")) or 0.0) for r in records]
    known = [(step, max(step - rollout, 0.0)) for step, rollout in times if step is not None]
    if not known:
        return None
    name = f"the last {len(known)} steps (measured)"
    return StepSeconds(name, max(whole for whole, _ in known), max(after for _, after in known))


def planned_steps(plan: Plan) -> list[StepSeconds]:
    """Return the planned seconds of a step of each stage, without evaluations."""
    return [
        StepSeconds(f"stage {i} (planned)", each.time.total, each.time.total - each.time.parts["generation"])
        for i, each in enumerate(plan.stages, 1)
    ]


def steps_of(config: Config, gpus: int) -> list[StepSeconds]:
    """Return what is known of the run's steps before it starts: measured ones, and planned ones if a plan is possible.

    gpus  of the run
    """
    try:
        shape = shape_of(config.model.path)
        device = measured(find_device(None, config.model.device)[0], shape, config.model.dtype)
        planned = planned_steps(make_plan(config, shape, device, gpus=gpus))
    except Or1Error:
        planned = []  # A model or a device that the plan does not know; the run itself may know both.
    own = measured_step(config.run_path)
    return [*([] if own is None else [own]), *planned]


def grace_of(steps: Sequence[StepSeconds]) -> int:
    """Return the seconds between SIGTERM and the end of a job that the run needs; DEFAULT_GRACE_S if none is known."""
    if not steps:
        return DEFAULT_GRACE_S
    return max(_LEAST_S, math.ceil(_MARGIN * max(step.after for step in steps) + _WRITE_S))


def checkpoint_gap(config: Config, step_s: float) -> float:
    """Return the seconds between two checkpoints in steps of `step_s` seconds."""
    settings = config.checkpoint
    steps = settings.every_steps
    if settings.every_minutes is not None:
        steps = min(steps, math.ceil(60 * settings.every_minutes / step_s))
    return steps * step_s


def job_warnings(config: Config, steps: Sequence[StepSeconds], limits: JobLimits) -> list[str]:
    """Return a warning with its remedy for each way in which a job's limits would lose work of the run."""
    found = []
    for step in steps:
        if step.after > limits.grace_s:
            found.append(
                f"WARNING: {step.name}: {duration(step.after)} of a step follow its rollout, more than the grace of "
                f"{duration(limits.grace_s)} between SIGTERM and the end of a job, which would lose that step; "
                f"give a grace of {grace_of([step])} s (`or1 plan CONFIG --grace`)"
            )
        if limits.job_s is None:
            continue
        gap = checkpoint_gap(config, step.whole)
        if gap > limits.job_s:
            found.append(
                f"WARNING: {step.name}: a checkpoint every {duration(gap)}, and the job lasts "
                f"{duration(limits.job_s)}: a job that is killed has none, and all its work is lost; "
                "set checkpoint.every_minutes = 60, or lower checkpoint.every_steps"
            )
        if step.whole > limits.job_s:
            found.append(
                f"WARNING: {step.name}: a step takes {duration(step.whole)}, and the job lasts "
                f"{duration(limits.job_s)}; give the job more time or more GPUs, or lower prompts_per_step"
            )
    return found


def job_lines(config: Config, steps: Sequence[StepSeconds]) -> list[str]:
    """Return a line about checkpoints and grace in the longest of the steps; none if no step is known."""
    if not steps:
        return []
    longest = max(steps, key=lambda step: step.whole)
    return [
        f"Stop: a checkpoint every {duration(checkpoint_gap(config, longest.whole))} at most, and a grace of "
        f"{grace_of(steps)} s after SIGTERM for what follows a rollout."
    ]


def gpus_of_job(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of GPUs that a start in this environment has, as torchrun or SLURM tell; 1 if neither does."""
    if (world := _number(environment.get("WORLD_SIZE"))) is not None:
        return max(1, int(world))
    nodes, each = (_number(environment.get(f"SLURM_{name}")) for name in ("JOB_NUM_NODES", "GPUS_ON_NODE"))
    return max(1, int((nodes or 1) * (each or 1)))


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]  # other types raise
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
