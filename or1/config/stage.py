"""`[[stage]]`: batch and context of one part of the run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from or1.config.base import MOST_STEPS, MOST_TOKENS, Section


class StageConfig(Section):
    """`[[stage]]`"""

    steps: int = Field(ge=1, le=MOST_STEPS)
    """Rollout steps in this stage; with `until = "plateau"`, the most it takes."""
    until: Literal["steps", "plateau"] = "steps"
    """When to hand over: after `steps`, or as soon as evaluations are surely flat: in accuracy (in mean reward where
    rewards are graded), and in the truncation rate of the training steps between them."""
    plateau_evals: int = Field(6, ge=1, le=MOST_STEPS)
    """Evaluations of a window. A line through the last two windows tells what a window gains; more windows need more
    evaluations, and bear more noise. 1 compares two evaluations and allows for no noise."""
    plateau_gain: float = Field(0.005, gt=0, le=1e6)
    """Smallest rise of accuracy or mean reward, or fall of the truncation rate, in a window that counts as a gain."""
    max_response_tokens: int = Field(ge=1, le=MOST_TOKENS)
    """Response limit of this stage; a longer response is truncated and, by default, scores 0."""
    prompts_per_step: int = Field(ge=1, le=2**20)
    """Prompts of one rollout step (the paper's D_R)."""
    group_size: int = Field(ge=2, le=65536)
    """Responses per prompt (the paper's gs)."""
    minibatch_prompts: int | None = Field(None, ge=1, le=2**20)
    """Prompts of one optimizer step (the paper's D_T); absent means prompts_per_step, which is on-policy."""

    reuse: int = Field(1, ge=1, le=1000)
    """Passes over each rollout (the paper's N_reuse); above 1 is off-policy."""

    @property
    def updates_per_step(self) -> int:
        """N_SGD = D_R / D_T * N_reuse (paper, Eq. 4.1), before rejection makes the rollout smaller."""
        return -(-self.prompts_per_step // (self.minibatch_prompts or self.prompts_per_step)) * self.reuse

    @property
    def on_policy(self) -> bool:
        """Whether one rollout feeds exactly one optimizer step, so that the ratio is 1 and the clip inert."""
        return self.updates_per_step == 1
