"""`[loss]`, `[loss.entropy]` and `[loss.mismatch]`: the policy objective. docs/objectives.md compares the choices."""

from __future__ import annotations

from typing import Any, Literal

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


# (lower, upper) of each kind unless given; None: no bound. docs/objectives.md names the sources.
_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "tis": (None, 2.0),
    "mis": (None, 2.0),
    "icepop": (0.5, 5.0),
    "sequence_tis": (None, 2.0),
    "sequence_mis": (None, 2.0),
    "geometric": (0.999, 1.001),
}


class MismatchConfig(Section):
    """`[loss.mismatch]`"""

    kind: Literal["none", "tis", "mis", "icepop", "sequence_tis", "sequence_mis", "geometric"] = "none"
    """Correction for an engine whose log-probs differ from the trainer's, by rho = exp(trainer - engine) of a token.
    tis: weight rho, moved to the bounds. mis: weight rho, 0 above `upper`. icepop: weight rho, 0 outside the bounds.
    sequence_tis, sequence_mis: the same with the product of all rho of a response; they need a pass for old log-probs.
    geometric: no weight; a response whose geometric mean of rho is outside the bounds is not trained (same pass)."""
    lower: float | None = Field(None, ge=0, le=1)
    """Lower bound. Default 0.5 (icepop), 0.999 (geometric), else none. mis has none."""
    upper: float | None = Field(None, ge=1, le=1e9)
    """Upper bound. Default 5.0 (icepop), 1.001 (geometric), else 2.0."""

    @model_validator(mode="before")
    @classmethod
    def _bounds_of_kind(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("kind") in _BOUNDS:
            defaults = dict(zip(("lower", "upper"), _BOUNDS[data["kind"]], strict=True))
            return defaults | {name: value for name, value in data.items() if value is not None}
        return data

    @property
    def by_sequence(self) -> bool:
        """True if the log-probs of a whole response decide, and so must be known before the update."""
        return self.kind in ("sequence_tis", "sequence_mis", "geometric")

    @property
    def weighs(self) -> bool:
        """True for an importance weight; a geometric mask is none."""
        return self.kind not in ("none", "geometric")

    @property
    def masks(self) -> bool:
        """True if a value outside the bounds leaves the policy gradient, instead of moving to the bound."""
        return self.kind in ("mis", "icepop", "sequence_mis", "geometric")


# What each preset sets in `[loss]`; keys that are given as well win.
PRESETS: dict[str, dict[str, Any]] = {
    "dapo": {"kind": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28, "normaliser": "token", "refill_rounds": 10},
    "dr_grpo": {"kind": "ppo_clip", "normaliser": "dr_grpo", "advantage_std": False, "reject_zero_advantage": False},
    "gspo": {"kind": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "normaliser": "sequence"},
}


class LossConfig(Section):
    """`[loss]`"""

    preset: Literal["dapo", "dr_grpo", "gspo"] | None = None
    """A published recipe, as defaults of the other settings of [loss]; settings that are given win.
    dapo: clip_high 0.28, refill_rounds 10, token mean. dr_grpo: no division by length or standard deviation, no
    rejection. gspo: kind "gspo", clip 3e-4 and 4e-4, sequence mean."""
    kind: Literal["ppo_clip", "cispo", "gspo"] = "ppo_clip"
    """Objective of a token. ppo_clip: PPO's clip. cispo: REINFORCE with a clipped weight. gspo: PPO's clip of the ratio
    of the whole response; the same as ppo_clip when on-policy."""
    clip_low: float = Field(0.2, ge=0, le=1)
    """The ratio is clipped below 1 - clip_low. 1: never, as CISPO is often used."""
    clip_high: float = Field(0.2, ge=0)
    """The ratio is clipped above 1 + clip_high; larger than clip_low is DAPO's clip-higher."""
    old_logp: Literal["auto", "recompute", "rollout"] = "auto"
    """Old log-probs. auto: none when on-policy, else recompute. rollout: those of the engine."""
    is_cap: float | None = Field(None, gt=0)
    """Cap of the truncated importance weight between engine and trainer; absent means no correction. The same as
    mismatch.kind = "tis" with this upper bound. Beside the mask "geometric" both act."""
    reject_zero_advantage: bool = True
    """Reject groups whose responses are all wrong or all correct (paper, section 3.1)."""
    normaliser: Literal["token", "sequence", "dr_grpo"] = "token"
    """token: divide by all trained tokens (Eq. 3.1). sequence: mean over responses of token means (GRPO).
    dr_grpo: divide by responses times max_response_tokens."""
    denominator: Literal["kept", "sampled"] = "kept"
    """Effect of rejection on the step size. kept: divide by the trained tokens (paper), in minibatches of nearly equal
    size. sampled: full minibatches and a smaller last one, divided like a full one, so its step is smaller (code)."""
    advantage: Literal["group", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = "group"
    """Baseline of a reward r. group: (r - mean of the group) / std of the group (GRPO). rloo: r - mean of the others of
    the group. reinforce_pp: (r - mean) / std of all responses of the step, so no group is rejected for equal rewards.
    reinforce_pp_baseline: (r - mean of the group) / std of these differences over the step."""
    advantage_mask: Literal["none", "before", "after"] = "none"
    """Treatment of truncated responses. none: like any other wrong response (paper). before: excluded from the group's
    mean and std, advantage 0. after: included in mean and std, advantage 0 (paper, section 3.2.3)."""
    advantage_std: bool = True
    """Divide advantages by the group's standard deviation; false as in Dr.GRPO. Always false with "rloo"."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the k3 estimate of KL(policy || reference). 0, as in the report, loads no reference model."""
    reference: str | None = None
    """Hugging Face checkpoint of the reference model; absent means model.path. Only read when kl_coef > 0."""
    refill_rounds: int = Field(0, ge=0)
    """Most extra rollouts of a step that replace rejected groups (DAPO's dynamic sampling); 0: the batch shrinks."""
    mismatch: MismatchConfig = MismatchConfig()
    entropy: EntropyConfig = EntropyConfig()

    @model_validator(mode="before")
    @classmethod
    def _preset_values(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        preset = data.get("preset")
        values = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        return ({"advantage_std": False} if data.get("advantage") == "rloo" else {}) | values | data

    @property
    def weighs_engine(self) -> bool:
        """True if importance weights correct for an engine that is not the policy which is trained."""
        return self.is_cap is not None or self.mismatch.weighs

    def sees_sequences(self, *, on_policy: bool) -> bool:
        """Return True if the loss of a token depends on its whole response. A ratio of 1 needs no response."""
        return self.kind == "gspo" and (self.old_logp == "rollout" or self.scores_first(off_policy=not on_policy))

    def scores_first(self, *, off_policy: bool) -> bool:
        """Return True if a forward pass computes old log-probs before the update."""
        return self.old_logp == "recompute" or (self.old_logp == "auto" and (off_policy or self.mismatch.by_sequence))
