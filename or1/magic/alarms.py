"""Stability watch: warns of an entropy or an engine that leaves its bounds, and names the setting to change.

Findings cited are those of the Skywork-OR1 report (arXiv 2505.22312), sections 3.2 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from or1.config import Config, StageConfig

BASELINE_STEPS = 5
"""Number of first steps; later steps are compared with their mean entropy."""
PATIENCE = 5
"""Steps in a row beyond a bound before an alarm, so that one noisy batch raises none."""
REPEAT = 50
"""Steps before the same alarm repeats."""
MISMATCH = 0.05
"""Largest mismatch/kl of a rounded engine. k3 of a small log-ratio d is d^2 / 2, so importance weights then spread by
sqrt(2 * 0.05) = 0.3 around 1."""


@dataclass
class EntropyWatch:
    """A count of steps beyond the bounds. Part of the checkpoint, so a resumed run warns at the same steps.

    first      entropies of the first steps, nats per token
    beyond     steps in a row beyond each bound
    sounded    step of the last alarm of each kind
    """

    first: list[float] = field(default_factory=list)
    beyond: dict[str, int] = field(default_factory=lambda: {"low": 0, "high": 0})
    sounded: dict[str, int] = field(default_factory=dict)

    @property
    def baseline(self) -> float:
        """Mean entropy of the first steps; NaN before they are done."""
        return math.fsum(self.first) / BASELINE_STEPS if len(self.first) == BASELINE_STEPS else math.nan

    def note(self, step: int, entropy: float, config: Config, stage: StageConfig) -> str | None:
        """Record the entropy of a step, over all sampled tokens. Return a warning that is due, or None."""
        if len(self.first) < BASELINE_STEPS:
            self.first.append(entropy)
            return None
        bounds, first = config.loss.entropy, self.baseline
        # A controller that raises the entropy to its target as configured causes no explosion.
        highest = max(first, bounds.target) if bounds.control == "adaptive" else first
        outside = {"low": entropy < bounds.alarm_low * first, "high": entropy > bounds.alarm_high * highest}
        for side, is_out in outside.items():
            self.beyond[side] = self.beyond[side] + 1 if is_out else 0
        for side in outside:
            if self.beyond[side] >= PATIENCE and step - self.sounded.get(side, -REPEAT) >= REPEAT:
                self.sounded[side] = step
                cause = collapse_advice(config, stage) if side == "low" else explosion_advice(config, stage)
                word = "collapsed" if side == "low" else "exploded"
                return f"step {step}: entropy {word}, {self.baseline:.3g} -> {entropy:.3g} nats per token; {cause}"
        return None

    def note_mismatch(self, step: int, kl: float) -> str | None:
        """Record mismatch/kl of a step with a rounded engine, nats per token. Return a warning that is due, or None."""
        count = self.beyond["mismatch"] = self.beyond.get("mismatch", 0) + 1 if kl > MISMATCH else 0
        if count < PATIENCE or step - self.sounded.get("mismatch", -REPEAT) < REPEAT:
            return None
        self.sounded["mismatch"] = step
        return (
            f"step {step}: engine and trainer drift apart, mismatch/kl = {kl:.2g} nats per token (alarm above "
            f"{MISMATCH:g}); remove rollout.vllm.quantization or kv_cache_dtype, or lower loss.is_cap"
        )

    def restart(self) -> None:
        """Forget the baseline: the next steps sample in another way."""
        self.first = []
        self.beyond |= {"low": 0, "high": 0}

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint's manifest."""
        return asdict(self)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.first, self.beyond, self.sounded = list(state["first"]), dict(state["beyond"]), dict(state["sounded"])


def collapse_advice(config: Config, stage: StageConfig) -> str:
    """Return advice against a collapse, for the most likely cause in this config first."""
    advice = []
    if stage.updates_per_step > 1:
        advice.append(
            f"make the step on-policy: minibatch_prompts = prompts_per_step, reuse = 1 (now "
            f"{stage.updates_per_step} updates a rollout; more updates collapse sooner, Ablation 6)"
        )
    if config.loss.entropy.control == "none":
        advice.append('set loss.entropy.control = "adaptive" with a target (it prevented collapse, Ablation 9)')
    elif config.loss.entropy.control == "constant":
        advice.append('set loss.entropy.control = "adaptive" (a constant coefficient decays or explodes, Ablation 8)')
    else:
        advice.append(
            f"raise loss.entropy.coef_max = {config.loss.entropy.coef_max:g} or loss.entropy.delta = "
            f"{config.loss.entropy.delta:g}, the bonus is too weak to hold its target"
        )
    if config.rollout.temperature < 1:
        advice.append(
            f"raise rollout.temperature = {config.rollout.temperature:g} to 1 (0.6 starts near collapse, Ablation 4)"
        )
    if stage.updates_per_step > 1 and config.loss.clip_high <= 0.2:
        advice.append("raise loss.clip_high to 0.25 (clip-higher, Ablation 10)")
    return "or ".join(f"{item}; " for item in advice).removesuffix("; ")


def explosion_advice(config: Config, stage: StageConfig) -> str:
    """Return advice against an explosion, for the most likely cause in this config first."""
    entropy = config.loss.entropy
    advice = []
    if entropy.control == "constant":
        advice.append(
            f'lower loss.entropy.coef = {entropy.coef:g} or set control = "adaptive" (constant coefficients '
            "of 5e-4 and more exploded, Ablation 8)"
        )
    if entropy.control == "adaptive":
        advice.append(f"lower loss.entropy.delta = {entropy.delta:g} or loss.entropy.coef_max = {entropy.coef_max:g}")
        if stage.updates_per_step >= 4:
            advice.append(
                f"take fewer updates a rollout (now {stage.updates_per_step}; adaptive control is unstable "
                "from 4 on, section 4.5)"
            )
    if config.loss.clip_high >= 0.28:
        advice.append(
            f"lower loss.clip_high = {config.loss.clip_high:g} to 0.25 (0.28 shot up without gain, Ablation 10)"
        )
    advice.append(f"lower optim.lr = {config.optim.lr:g}")
    return "or ".join(f"{item}; " for item in advice).removesuffix("; ")
