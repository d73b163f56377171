"""Which stage a step belongs to (multi-stage training; Skywork-OR1 report, section 3.1)."""

from __future__ import annotations

from or1.config import Config, StageConfig


def stage_at(config: Config, step: int) -> tuple[int, StageConfig]:
    """Index and settings of the stage that runs rollout step `step`, counted from 1.

    Raises IndexError past the last step.
    """
    end = 0
    for index, stage in enumerate(config.stage):
        end += stage.steps
        if step <= end:
            return index, stage
    raise IndexError(f"step {step} is past the last of {config.total_steps} steps; add a [[stage]]")


def last_step_of(config: Config, index: int) -> int:
    """The last rollout step of stage `index`."""
    return sum(stage.steps for stage in config.stage[: index + 1])
