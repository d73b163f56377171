"""`[checkpoint]`, `[eval]`, `[log]`: what a run keeps, measures and writes."""

from __future__ import annotations

from pydantic import Field

from or1.config.base import Section


class CheckpointConfig(Section):
    """`[checkpoint]`"""

    every_steps: int = Field(20, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""


class EvalSet(Section):
    """`[[eval.sets]]`"""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name in the metrics: eval/{name}/avg@k."""
    path: str
    """JSONL or parquet file of problems."""
    samples: int = Field(1, ge=1)
    """Responses per problem: the k of avg@k and pass@k."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    limit: int | None = Field(None, ge=1)
    """Take only the first problems."""


class EvalConfig(Section):
    """`[eval]`"""

    every_steps: int = Field(20, ge=1)
    """Steps between evaluations; the first and the last step always have one."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Response limit of evaluations; absent means that of the last stage."""
    sets: tuple[EvalSet, ...] = ()
    """Held-out sets."""


class LogConfig(Section):
    """`[log]`"""

    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    rollouts_every_steps: int = Field(1, ge=1)
    """Steps between saved rollouts (rollouts/step_N.parquet)."""
