"""`[loss]` and `[loss.entropy]`: the policy objective."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from or1.config.section import Section


class EntropyConfig(Section):
    """`[loss.entropy]`"""

    control: Literal["none", "constant", "adaptive"] = "none"
    """none: no bonus. constant: always `coef`. adaptive: the MAGIC controller (paper, Eq. 3.2)."""
    variant: Literal["script", "paper"] = "script"
    """script: the released code (gate lags a step, coefficient clipped). paper: Eq. 3.2 (gate on the same step)."""
    coef: float = Field(0.0, ge=0)
    """Coefficient; with control = "adaptive", its initial value."""
    target: float = Field(0.2, ge=0)
    """Target entropy of the adaptive controller, in nats per token."""
    measure: Literal["kept", "all"] = "kept"
    """Tokens over which the entropy is measured. kept: tokens of kept groups, as in the released code. all: every
    sampled token. Kept groups have mixed outcomes, so once most groups are solved they no longer show a collapse."""
    delta: float = Field(1e-4, gt=0)
    """Change of the coefficient per step. Default 1e-4 (script) or 5e-3 (paper)."""
    coef_min: float = 0.0
    """Lower bound of the coefficient. The paper has none; a negative coefficient penalises entropy."""
    coef_max: float = Field(5e-3, gt=0)
    """Upper bound of the coefficient. Default 5e-3 (script) or 1.0 (paper, which has no bound)."""
    alarm_low: float = Field(0.1, ge=0)
    """Warn of entropy collapse below this fraction of the first steps' entropy; 0: never."""
    alarm_high: float = Field(3.0, gt=1)
    """Warn of entropy explosion above this multiple of the first steps' entropy. With control = "adaptive", above this
    multiple of `target` if that is higher."""

    @model_validator(mode="before")
    @classmethod
    def _variant_defaults(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("variant") == "paper":
            return {"delta": 5e-3, "coef_max": 1.0} | data
        return data


class LossConfig(Section):
    """`[loss]`"""

    kind: Literal["ppo_clip", "cispo"] = "ppo_clip"
    """Per-token objective."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """The ratio is clipped above 1 + clip_high; larger than clip_low is DAPO's clip-higher."""
    old_logp: Literal["auto", "recompute", "rollout"] = "auto"
    """Old log-probs. auto: none when on-policy, else recompute. rollout: those of the engine."""
    is_cap: float | None = Field(None, gt=0)
    """Cap of the truncated importance weight between engine and trainer; absent means no correction."""
    reject_zero_advantage: bool = True
    """Reject groups whose responses are all wrong or all correct (paper, section 3.1)."""
    normaliser: Literal["token", "sequence", "dr_grpo"] = "token"
    """token: divide by all trained tokens (Eq. 3.1). sequence: mean over responses of token means (GRPO).
    dr_grpo: divide by responses times max_response_tokens."""
    denominator: Literal["kept", "sampled"] = "kept"
    """Effect of rejection on the step size. kept: divide by the trained tokens (paper), in minibatches of nearly equal
    size. sampled: full minibatches and a smaller last one, divided like a full one, so its step is smaller (code)."""
    advantage_mask: Literal["none", "before", "after"] = "none"
    """Treatment of truncated responses. none: like any other wrong response (paper). before: excluded from the group's
    mean and std, advantage 0. after: included in mean and std, advantage 0 (paper, section 3.2.3)."""
    advantage_std: bool = True
    """Divide advantages by the group's standard deviation; false as in Dr.GRPO."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the k3 estimate of KL(policy || reference). 0, as in the report, loads no reference model."""
    reference: str | None = None
    """Hugging Face checkpoint of the reference model; absent means model.path. Only read when kl_coef > 0."""
    refill_rounds: int = Field(0, ge=0)
    """Most extra rollouts of a step that replace rejected groups (DAPO's dynamic sampling); 0: the batch shrinks."""
    entropy: EntropyConfig = EntropyConfig()
