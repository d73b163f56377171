"""Arms of the study: the report's comparisons, with half as many prompts and half as many responses to each.

An arm is named by the report's quadruple (N_SGD, D_R, D_T, N_reuse) where the report has one. Here D_R is 32 instead
of 64, and groups have 8 instead of 16 responses. Entropy coefficients are 50 times the report's, so that the range
covers decay and explosion here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.paper.history.task import LONGEST, SHORT

# First seed of the study. The trials that fixed sizes and rates used smaller seeds.
FIRST_SEED = 101
STEPS = 50
PROMPTS = 32
LR = 1e-4
EVALUATIONS = 5
ADAPTIVE = {"control": "adaptive", "target": 0.15, "delta": 0.02, "coef_max": 0.25}


@dataclass(frozen=True)
class Arm:
    """One setting, run on several seeds.

    steps      rollout steps
    prompts    D_R
    minibatch  D_T
    reuse      N_reuse
    group      gs
    limits     response limit of each stage; stages share the steps equally
    seeds      number of seeds
    """

    steps: int = STEPS
    prompts: int = PROMPTS
    minibatch: int = PROMPTS
    reuse: int = 1
    group: int = 8
    limits: tuple[int, ...] = (LONGEST,)
    temperature: float = 1.0
    entropy: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 3

    def config(self, base: Path, run_dir: Path, seed: int) -> dict[str, Any]:
        """Return the settings of `or1 train` for one seed of this arm, starting from the model in `base`."""
        stages = [
            {
                "steps": self.steps // len(self.limits),
                "max_response_tokens": limit,
                "prompts_per_step": self.prompts,
                "minibatch_prompts": self.minibatch,
                "reuse": self.reuse,
                "group_size": self.group,
            }
            for limit in self.limits
        ]
        test = {"name": "test", "path": str(base / "heldout.jsonl"), "temperature": 0.6}
        return {
            "run_dir": str(run_dir),
            "seed": seed,
            "stage": stages,
            "model": {"path": str(base), "dtype": "float32", "device": "cpu"},
            "data": {"train": [str(base / "train.jsonl")], "max_prompt_tokens": 16},
            "rollout": {"engine": "hf", "temperature": self.temperature, "batch_size": 512},
            "reward": {"kind": "benchmarks.paper.history.reward:score", "workers": 1},
            "loss": {**self.loss, "entropy": dict(self.entropy)},
            "optim": {"lr": LR, "warmup_steps": 0, "max_tokens_per_rank": 8192},
            "checkpoint": {"every_steps": 10 * self.steps},
            "log": {"tensorboard": False, "rollouts_every_steps": self.steps},
            "eval": {"every_steps": self.steps // EVALUATIONS, "max_response_tokens": LONGEST, "sets": [test]},
        }


def _off_policy(updates: int, **more: Any) -> Arm:
    return Arm(minibatch=PROMPTS // updates, **more)


def _constant(coef: float) -> Arm:
    return _off_policy(2, entropy={"control": "constant", "coef": coef})


def _clip_higher(high: float) -> Arm:
    return _off_policy(4, loss={"clip_high": high})


def _masked(mask: str) -> Arm:
    return _off_policy(2, limits=(SHORT,), steps=STEPS // 2, entropy=ADAPTIVE, loss={"advantage_mask": mask})


# Seeds of the most important comparisons.
_CORE = 6

ARMS: dict[str, Arm] = {
    "(1,32,32,1)": Arm(seeds=_CORE),
    "(2,32,16,1)": _off_policy(2, seeds=_CORE),
    "(2,32,32,2)": Arm(reuse=2, seeds=_CORE),
    "(4,32,8,1)": _off_policy(4, seeds=_CORE),
    "(4,32,32,4)": Arm(reuse=4, seeds=_CORE),
    "(1,16,16,1)": Arm(prompts=16, minibatch=16, steps=2 * STEPS, seeds=_CORE),
    "(1,8,8,1)": Arm(prompts=8, minibatch=8, steps=4 * STEPS, seeds=_CORE),
    "(4,128,32,1)": Arm(prompts=128, minibatch=32, steps=STEPS // 2),
    "group 4": Arm(group=4),
    "group 16": Arm(group=16),
    "constant 0.005": _constant(0.005),
    "constant 0.05": _constant(0.05),
    "constant 0.25": _constant(0.25),
    "constant 0.5": _constant(0.5),
    "(4,32,8,1) adaptive": _off_policy(4, entropy=ADAPTIVE, seeds=_CORE),
    "clip 0.25": _clip_higher(0.25),
    "clip 0.265": _clip_higher(0.265),
    "clip 0.28": _clip_higher(0.28),
    "temperature 1": _off_policy(2, entropy=ADAPTIVE),
    "temperature 0.6": _off_policy(2, entropy=ADAPTIVE, temperature=0.6),
    "short, then long": _off_policy(2, entropy=ADAPTIVE, limits=(SHORT, LONGEST)),
    "no mask": _masked("none"),
    "mask before": _masked("before"),
    "mask after": _masked("after"),
}
