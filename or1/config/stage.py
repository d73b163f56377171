"""`[[stage]]`: the stages of a run, and the settings of other sections that a stage may have of its own."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import Field

from or1.config.section import MOST_STEPS, MOST_TOKENS, Section

S = TypeVar("S", bound=Section)


class StageEntropyConfig(Section):
    """`[stage.loss.entropy]`: settings of [loss.entropy] for this stage alone; what is absent is that of the run."""

    control: Literal["none", "constant", "adaptive"] | None = None
    """As loss.entropy.control. none: the coefficient of the run has no effect."""
    coef: float | None = Field(None, ge=0)
    """As loss.entropy.coef. With control = "adaptive", the controller starts from this value in this stage."""
    target: float | None = Field(None, ge=0)
    """As loss.entropy.target."""
    measure: Literal["kept", "all"] | None = None
    """As loss.entropy.measure."""
    delta: float | None = Field(None, gt=0)
    """As loss.entropy.delta."""
    coef_min: float | None = None
    """As loss.entropy.coef_min."""
    coef_max: float | None = Field(None, gt=0)
    """As loss.entropy.coef_max."""


class StageLossConfig(Section):
    """`[stage.loss]`: settings of [loss] for this stage alone; what is absent is that of the run."""

    kind: Literal["ppo_clip", "cispo", "gspo"] | None = None
    """As loss.kind."""
    clip_low: float | None = Field(None, ge=0, le=1)
    """As loss.clip_low."""
    clip_high: float | None = Field(None, ge=0)
    """As loss.clip_high."""
    kl_coef: float | None = Field(None, ge=0)
    """As loss.kl_coef. The reference model is in memory only during stages whose coefficient is above 0."""
    is_cap: float | None = Field(None, gt=0)
    """As loss.is_cap. A stage cannot remove the cap of the run; set the cap in each stage that needs one."""
    advantage_mask: Literal["none", "before", "after"] | None = None
    """As loss.advantage_mask."""
    entropy: StageEntropyConfig = StageEntropyConfig()


class StageRolloutConfig(Section):
    """`[stage.rollout]`: settings of [rollout] for this stage alone; what is absent is that of the run."""

    temperature: float | None = Field(None, ge=1e-3, le=100)
    """As rollout.temperature. The entropy alarm then takes its baseline anew from the first steps of this stage."""
    top_p: float | None = Field(None, gt=0, le=1)
    """As rollout.top_p."""


class StageOptimConfig(Section):
    """`[stage.optim]`: settings of [optim] for this stage alone; what is absent is that of the run."""

    lr: float | None = Field(None, gt=0, le=10)
    """As optim.lr, from the first update of the stage. The warm-up counts the updates of the whole run."""


OVERRIDDEN = ("loss", "rollout", "optim")
"""Sections of the run that a stage may override in part."""


class StageConfig(Section):
    """`[[stage]]`: a training stage."""

    steps: int = Field(ge=1, le=MOST_STEPS)
    """Rollout steps of this stage; with `until = "plateau"`, the largest number of steps."""
    until: Literal["steps", "plateau"] = "steps"
    """End of the stage. steps: after `steps`. plateau: as soon as accuracy (mean reward for graded rewards) and the
    truncation rate of the training steps between evaluations have become flat."""
    plateau_evals: int = Field(6, ge=1, le=MOST_STEPS)
    """Evaluations per window. A line fitted through the last two windows gives the gain of a window. Larger windows
    need more evaluations and tolerate more noise. 1 compares two evaluations and does not account for noise."""
    plateau_gain: float = Field(0.005, gt=0, le=1e6)
    """Smallest rise of accuracy or mean reward, or fall of the truncation rate, per window that counts as a gain."""
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
    loss: StageLossConfig = StageLossConfig()
    rollout: StageRolloutConfig = StageRolloutConfig()
    optim: StageOptimConfig = StageOptimConfig()

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps per rollout, N_SGD = D_R / D_T * N_reuse (paper, Eq. 4.1), not counting rejected groups."""
        return -(-self.prompts_per_step // (self.minibatch_prompts or self.prompts_per_step)) * self.reuse

    @property
    def on_policy(self) -> bool:
        """True if one rollout has exactly one optimizer step. The ratio is then 1 and the clip inert."""
        return self.updates_per_step == 1

    def own_settings(self) -> dict[str, Any]:
        """Return the settings of other sections that this stage sets: dotted path, such as "loss.kl_coef" -> value."""
        found = self.model_dump(include=set(OVERRIDDEN), exclude_none=True)
        return {path: value for name in OVERRIDDEN for path, value in _leaves(found[name], name)}


def _leaves(table: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found = []
    for name, value in table.items():
        path = f"{prefix}.{name}"
        found += _leaves(value, path) if isinstance(value, dict) else [(path, value)]
    return found


def with_settings(section: S, values: dict[str, Any]) -> S:
    """Return the section with other values. values: dotted path within the section -> value."""
    update: dict[str, Any] = {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        update[name] = with_settings(update.get(name, getattr(section, name)), {rest: value}) if rest else value
    return section.model_copy(update=update)
