"""Held-out evaluation: avg@k and pass@k over named sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from or1.config import EvalSet
from or1.dist import SINGLE, World
from or1.reward.base import Scorer
from or1.rollout.base import Engine, Sampling
from or1.rollout.collect import Progress, no_progress
from or1.rollout.spread import collect_spread
from or1.types import Prompt


@dataclass(frozen=True)
class EvalResult:
    """avg: mean correctness over k samples. ci95: half width of its interval over problems. pass_k: see `pass_at_k`."""

    name: str
    k: int
    avg: float
    ci95: float
    pass_k: float
    length: float
    truncated: float

    def metrics(self) -> dict[str, float]:
        """As metric names."""
        prefix = f"eval/{self.name}"
        return {
            f"{prefix}/avg@{self.k}": self.avg,
            f"{prefix}/avg@{self.k}_ci95": self.ci95,
            f"{prefix}/pass@{self.k}": self.pass_k,
            f"{prefix}/len_mean": self.length,
            f"{prefix}/truncated": self.truncated,
        }


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased chance that k samples contain a right one: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples, but there are {samples} samples; raise samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def evaluate_set(
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    settings: EvalSet,
    max_tokens: int,
    *,
    progress: Progress = no_progress,
    world: World = SINGLE,
) -> EvalResult:
    """Sample every problem `settings.samples` times, under one seed: two evaluations differ by policy alone."""
    sampling = Sampling(settings.temperature, max_tokens, settings.samples, seed=0)
    groups = collect_spread(world, engine, scorer, prompts, sampling, progress).groups
    # A response that could not be scored is not solved.
    rewards_PK = np.nan_to_num(np.stack([group.rewards for group in groups]))
    responses = [response for group in groups for response in group.responses]
    correct_P = (rewards_PK > 0).sum(axis=1)
    means_P = rewards_PK.mean(axis=1)
    spread = means_P.std(ddof=1) if len(means_P) > 1 else math.nan
    return EvalResult(
        name=settings.name,
        k=settings.samples,
        avg=float(means_P.mean()),
        ci95=float(1.96 * spread / math.sqrt(len(means_P))),
        pass_k=float(np.mean([pass_at_k(settings.samples, int(c), settings.samples) for c in correct_P])),
        length=float(np.mean([len(r.token_ids) for r in responses])),
        truncated=float(np.mean([r.truncated for r in responses])),
    )
