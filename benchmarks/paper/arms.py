"""Arms of the study, named by the report's quadruple (N_SGD, D_R, D_T, N_reuse) where the report has one.

The report's arms are at their own sizes, with groups of 8 instead of 16. Three kinds are not in the report: on-policy
arms with 2 and 4 times the learning rate, and on-policy arms with the updates and responses of an off-policy arm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ROLLOUTS = 400
MODEL_ROLLOUTS = 120
CONSTANTS = (0.05, 0.2, 0.4, 0.8)
MILD = (0.3, 0.006, 0.3)  # target, delta and greatest coefficient of the adaptive controller
STRONG = (0.4, 0.02, 0.4)


@dataclass(frozen=True)
class Arm:
    """One setting, run on every seed.

    prompts    D_R
    minibatch  D_T
    reuse      N_reuse
    group      responses of a prompt
    times      rollouts, as a multiple of ROLLOUTS
    lr_scale   factor of the tier's learning rate
    entropy    settings of the entropy controller, as in [loss.entropy]
    measure    tokens whose entropy the controller reads, as in [loss.entropy]
    filled     minibatches are at least nearly full, as or1 makes them, so few kept groups mean fewer steps (tier A)
    rollouts   their number, if not ROLLOUTS * times
    """

    name: str
    prompts: int = 64
    minibatch: int = 64
    reuse: int = 1
    group: int = 8
    times: int = 1
    lr_scale: float = 1.0
    clip_high: float = 0.2
    entropy: Mapping[str, Any] = field(default_factory=dict)
    measure: Literal["kept", "all"] = "kept"
    filled: bool = False
    rollouts: int = 0

    def __post_init__(self) -> None:
        if not self.rollouts:
            object.__setattr__(self, "rollouts", ROLLOUTS * self.times)


def _quadruple(prompts: int, minibatch: int, reuse: int = 1, label: str = "", **more: Any) -> Arm:
    name = f"({prompts // minibatch * reuse},{prompts},{minibatch},{reuse})"
    return Arm(" ".join([name, label]).strip(), prompts, minibatch, reuse, **more)


def _constant(coef: float) -> Arm:
    return _quadruple(64, 32, label=f"constant {coef:g}", entropy={"control": "constant", "coef": coef})


def _adaptive(target: float, delta: float, cap: float, measure: Literal["kept", "all"]) -> Arm:
    control = {"control": "adaptive", "target": target, "delta": delta, "coef_max": cap}
    return _quadruple(64, 16, label=f"adaptive {target:g} by {measure}", entropy=control, measure=measure)


_ADAPTIVE = (_adaptive(*MILD, "kept"), _adaptive(*STRONG, "all"))

_LIST = (
    _quadruple(64, 64),
    _quadruple(64, 32),
    _quadruple(64, 64, 2),
    _quadruple(64, 16),
    _quadruple(64, 64, 4),
    # Equal updates and responses: as many on-policy rollouts as the off-policy arm takes steps.
    _quadruple(32, 32, times=2),
    _quadruple(16, 16, times=4),
    # Equal distance: a step of an on-policy arm is as long as the steps of an off-policy arm together.
    _quadruple(64, 64, label="lr x 2", lr_scale=2),
    _quadruple(64, 64, label="lr x 4", lr_scale=4),
    _quadruple(64, 64, label="group 4", group=4),
    _quadruple(64, 64, label="group 16", group=16),
    _quadruple(256, 64),
    *map(_constant, CONSTANTS),
    *_ADAPTIVE,
    _quadruple(64, 16, label="clip 0.28", clip_high=0.28),
    *(_quadruple(64, 64, 4, label=f"clip {high:g}", clip_high=high) for high in (0.25, 0.265, 0.28, 0.5)),
    _quadruple(64, 16, label="filled", filled=True),
)

ARMS: dict[str, Arm] = {arm.name: arm for arm in _LIST}
"""Arms of tier A by name."""

ADAPTIVE = tuple(arm.name for arm in _ADAPTIVE)

MODEL_ARMS = ("(1,64,64,1)", "(4,64,64,4)", "(1,64,64,1) lr x 2")
"""Arms of tier B."""
