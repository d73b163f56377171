"""`[checkpoint]`, `[log]`: what a run keeps and writes."""

from __future__ import annotations

from pydantic import Field

from or1.config.base import MOST_STEPS, Section


class CheckpointConfig(Section):
    """`[checkpoint]`"""

    every_steps: int = Field(20, ge=1, le=MOST_STEPS)
    """Steps between checkpoints; the last step always has one."""
    keep: int = Field(2, ge=1, le=MOST_STEPS)
    """Newest checkpoints kept."""


class LogConfig(Section):
    """`[log]`"""

    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    rollouts_every_steps: int = Field(1, ge=1, le=MOST_STEPS)
    """Steps between saved rollouts (rollouts/step_N.parquet)."""
