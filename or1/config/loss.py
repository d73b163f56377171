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
    """Initial coefficient; for `constant`, the coefficient."""
    target: float = Field(0.2, ge=0)
    """Entropy in nats per token that the adaptive controller holds."""
    measure: Literal["kept", "all"] = "kept"
    """Whose tokens say how high the entropy is. kept: those of kept groups, as the released code. all: every sampled
    token; kept groups have mixed outcomes, so once most groups are solved they no longer show a collapse."""
    delta: float = Field(1e-4, gt=0)
    """Change of the coefficient per step. Default 1e-4 (script) or 5e-3 (paper)."""
    coef_min: float = 0.0
    """Lower bound of the coefficient. The paper names none; below 0 the bonus becomes a penalty on entropy."""
    coef_max: float = Field(5e-3, gt=0)
    """Upper bound of the coefficient. Default 5e-3 (script) or 1.0 (paper, which names no bound)."""
    alarm_low: float = Field(0.1, ge=0)
    """Warn of collapse below this share of the first steps' entropy; 0: never."""
    alarm_high: float = Field(3.0, gt=1)
    """Warn of explosion above this multiple of the first steps' entropy, or of `target` where control = "adaptive" and
    that is higher."""

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
    """Old log-probs. auto: none when on-policy, else recompute. rollout: trust the engine's."""
    is_cap: float | None = Field(None, gt=0)
    """Cap of the truncated importance weight between engine and trainer; absent means no correction."""
    reject_zero_advantage: bool = True
    """Leave out groups whose responses are all wrong or all right (paper, section 3.1)."""
    normaliser: Literal["token", "sequence", "dr_grpo"] = "token"
    """token: divide by all trained tokens (Eq. 3.1). sequence: mean over responses of token means (GRPO).
    dr_grpo: divide by responses times max_response_tokens."""
    denominator: Literal["kept", "sampled"] = "kept"
    """What rejection does to the step size. kept: divide by what is trained (paper), in near-equal minibatches.
    sampled: in full minibatches and a rest, which is divided as a full one, so that its step is smaller (code)."""
    advantage_mask: Literal["none", "before", "after"] = "none"
    """Truncated responses: none: wrong like any other (paper). before: out of the group's mean and std, advantage 0.
    after: in mean and std, advantage 0 (paper, section 3.2.3)."""
    advantage_std: bool = True
    """Divide advantages by the group's standard deviation; false is Dr.GRPO's choice."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the k3 estimate of KL(policy || reference); 0, the report's choice, loads no reference model."""
    reference: str | None = None
    """Hugging Face checkpoint of the reference model; absent means model.path. Only read when kl_coef > 0."""
    refill_rounds: int = Field(0, ge=0)
    """Extra rollouts a step may take to replace rejected groups (DAPO's dynamic sampling); 0: the batch shrinks."""
    entropy: EntropyConfig = EntropyConfig()
