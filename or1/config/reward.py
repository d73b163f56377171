"""`[reward]`: what a response is worth."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from or1.config.base import Section


class RewardConfig(Section):
    """`[reward]`"""

    kind: Literal["math"] = "math"
    """Verifier: math compares the last \\boxed{} with the gold answer through math-verify."""
    timeout_s: float = Field(5.0, gt=0)
    """Limit for one response; then its worker is killed and the response counted as a timeout."""
    workers: int = Field(2, ge=1)
    """Verifier processes."""
    require_think_close: bool = False
    """Score a response without `</think>` as truncated (0) instead of grading all of it."""
