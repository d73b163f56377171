"""Adaptive entropy control (MAGIC; Skywork-OR1 report, Eq. 3.2, and the released EntController)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from or1.config import EntropyConfig


@dataclass
class EntropyController:
    """Holds the policy's entropy at a target by moving the coefficient c of an entropy bonus.

    At step k, with e_k the rollout's entropy in nats per token:

    paper   alpha_k = c_k 1{e_k <= target};      then c += delta if e_k < target, -= delta if e_k > target
    script  alpha_k = c_k 1{e_{k-1} < target};   then c += delta if e_k < target, else c -= delta

    and c is clipped to [coef_min, coef_max] in both. `constant` always applies c; `none` applies 0.
    The state (coef, gate) belongs in every checkpoint: the released code lost it on resume and between stages.
    """

    config: EntropyConfig
    coef: float
    gate: bool = True

    @classmethod
    def start(cls, config: EntropyConfig) -> EntropyController:
        """The controller before the first step."""
        return cls(config, config.coef)

    def alpha(self, entropy: float) -> float:
        """The coefficient to apply in the step whose rollout has this entropy. Changes no state."""
        match self.config.control, self.config.variant:
            case "none", _:
                return 0.0
            case "constant", _:
                return self.coef
            case _, "paper":
                return self.coef if entropy <= self.config.target else 0.0
            case _:
                return self.coef if self.gate else 0.0

    def update(self, entropy: float) -> None:
        """Move c and the gate after that step."""
        config = self.config
        if config.control != "adaptive":
            return
        below = entropy < config.target
        if below or entropy > config.target or config.variant == "script":
            self.coef += config.delta if below else -config.delta
        self.coef = min(max(self.coef, config.coef_min), config.coef_max)
        self.gate = below

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {key: value for key, value in asdict(self).items() if key != "config"}
