"""`[dist]`: more than one process, started by `or1 train --nproc N` or torchrun."""

from __future__ import annotations

from pydantic import Field

from or1.config.base import MOST_SECONDS, Section


class DistConfig(Section):
    """`[dist]`: has no effect in a single process."""

    sequence_parallel: int = Field(1, ge=1, le=1024)
    """Ranks that share one packed row, each with part of its tokens (Ulysses); divides the number of ranks and the
    model's query and key-value heads. Raise it where one row's activations do not fit."""
    timeout_s: float = Field(1800.0, ge=1, le=MOST_SECONDS)
    """A rank waits this long for the others, generation of the slowest included; then the run ends."""
    heartbeat_timeout_s: float = Field(60.0, ge=1, le=MOST_SECONDS)
    """A rank that gives no sign of life for this long is dead, and the run ends on all others."""
