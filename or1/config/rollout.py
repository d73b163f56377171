"""`[rollout]`: the generation engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from or1.config.base import Section


class RolloutConfig(Section):
    """`[rollout]`"""

    engine: Literal["hf"] = "hf"
    """Generation engine; hf is transformers' generate inside the trainer."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the loss scales its logits by the same number."""
    batch_size: int = Field(256, ge=1)
    """Responses generated together."""
