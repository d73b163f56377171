"""`[[stage]]`: batch and context of one part of the run."""

from __future__ import annotations

from pydantic import Field

from or1.config.base import Section


class StageConfig(Section):
    """`[[stage]]`"""

    steps: int = Field(ge=1)
    """Rollout steps in this stage."""
    max_response_tokens: int = Field(ge=1)
    """Response limit of this stage; a longer response is truncated and scores 0."""
    prompts_per_step: int = Field(ge=1)
    """Prompts of one rollout step (the paper's D_R)."""
    group_size: int = Field(ge=2)
    """Responses per prompt (the paper's gs)."""
    minibatch_prompts: int | None = Field(None, ge=1)
    """Prompts of one optimizer step (the paper's D_T); absent means prompts_per_step, which is on-policy."""

    @property
    def on_policy(self) -> bool:
        """Whether one rollout feeds exactly one optimizer step, so that the ratio is 1 and the clip inert."""
        return self.minibatch_prompts is None or self.minibatch_prompts == self.prompts_per_step
