"""Adaptive entropy control (MAGIC; Skywork-OR1 report, Eq. 3.2, and the released EntController)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from or1.core.types import Group

if TYPE_CHECKING:
    from or1.config import EntropyConfig


@dataclass
class EntropyController:
    """A controller that holds the policy's entropy at a target: it moves the coefficient c of an entropy bonus.

    At step k, with e_k the rollout's entropy in nats per token:

    paper   alpha_k = c_k 1{e_k <= target};      then c += delta if e_k < target, -= delta if e_k > target
    script  alpha_k = c_k 1{e_{k-1} < target};   then c += delta if e_k < target, else c -= delta

    and c is clipped to [coef_min, coef_max] in both. control="constant" always applies c; "none" applies 0.

        alpha = controller.alpha(entropy)        before the update; loss -= alpha * mean entropy
        controller.update(entropy)               after it

    The defaults are the released code's. The paper's are variant="paper", delta=5e-3, coef_max=inf and, taken
    literally, coef_min=-inf: above the target c would become a penalty on entropy. The state (coef, gate) belongs in
    every checkpoint: the released code lost it on resume and between stages.
    """

    coef: float = 0.0
    gate: bool = True
    target: float = 0.2
    delta: float = 1e-4
    coef_min: float = 0.0
    coef_max: float = 5e-3
    variant: Literal["script", "paper"] = "script"
    control: Literal["none", "constant", "adaptive"] = "adaptive"

    def __post_init__(self) -> None:
        if self.variant not in ("script", "paper") or self.control not in ("none", "constant", "adaptive"):
            raise ValueError(
                f"variant is {self.variant!r} and control {self.control!r}; choose script or paper, and "
                "none, constant or adaptive"
            )
        if not self.delta > 0 or not self.coef_min <= self.coef_max or self.target < 0:
            raise ValueError(
                f"delta={self.delta}, coef in [{self.coef_min}, {self.coef_max}], target={self.target}; "
                "delta must be above 0, target at least 0, and the bounds in order"
            )

    @classmethod
    def start(cls, config: EntropyConfig) -> EntropyController:
        """Return the controller of a config before the first step."""
        names = {"coef", "target", "delta", "coef_min", "coef_max", "variant", "control"}
        return cls(**config.model_dump(include=names))

    def alpha(self, entropy: float) -> float:
        """Return the coefficient for the step whose rollout has this entropy, nats a token. Changes no state."""
        match self.control, self.variant:
            case "none", _:
                return 0.0
            case "constant", _:
                return self.coef
            case _, "paper":
                return self.coef if entropy <= self.target else 0.0
            case _:
                return self.coef if self.gate else 0.0

    def update(self, entropy: float) -> None:
        """Move c and the gate after the step whose rollout had this entropy, nats a token."""
        if self.control != "adaptive":
            return
        below = entropy < self.target
        if below or entropy > self.target or self.variant == "script":
            self.coef += self.delta if below else -self.delta
        self.coef = min(max(self.coef, self.coef_min), self.coef_max)
        self.gate = below

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint's manifest."""
        return {"coef": self.coef, "gate": self.gate}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises KeyError for a state without `coef` or `gate`."""
        self.coef, self.gate = float(state["coef"]), bool(state["gate"])

    # The names that or1.magic published first.
    state = state_dict

    def restore(self, state: Mapping[str, Any]) -> EntropyController:
        """Call `load_state` and return the controller."""
        self.load_state(state)
        return self


def rollout_entropy(groups: Sequence[Group]) -> float:
    """Return the mean of -log p over the sampled tokens, in nats per token; NaN without a token.

    The mean is an unbiased estimate of the policy's entropy. It is known before the update, so the coefficient of a
    step can depend on the entropy of the same step (Eq. 3.2).
    """
    logp = np.concatenate([np.empty(0, np.float32), *(r.logp for group in groups for r in group.responses)])
    known = logp[np.isfinite(logp)]
    return float(-known.mean(dtype=np.float64)) if len(known) else math.nan
