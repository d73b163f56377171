"""Comparison of engine and trainer: the same tokens must have the same log-probabilities after a push of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from or1.config import Config
from or1.core.errors import RunError
from or1.core.types import Prompt, TrainSequence
from or1.dist.oom_retry import RowBudget
from or1.dist.world import World
from or1.rollout.engine import Engine, MeteredEngine, Sampling
from or1.run.state import TrainState
from or1.train.metrics import UpdateStats
from or1.train.rank_rows import Policy
from or1.train.score import score

PROMPTS, SAMPLES, TOKENS = 4, 2, 64
"""Size of a check: enough tokens to find misplaced weights, at less than a hundredth of the cost of a step."""
LIMIT_FP32, LIMIT_BF16 = 1e-3, 0.1
"""Limits: the largest difference of a token in fp32 (seen: 1e-5) and the mean difference in bf16 (seen: 0.02, with
single tokens beyond 0.2). One tensor that was not pushed exceeds both."""

LIMIT_KL = {"float64": 1e-6, "float32": 1e-6, "bfloat16": 2e-2}
"""Limit of the mean k3 between trainer and embedded engine, which share their weights. Seen: 1e-12 in fp32, and 1.5e-3
in bf16 on a real model of 135 M parameters. Dropout of 0.1 gives 1e-3 in fp32, another attention more than 1."""


@dataclass(frozen=True)
class Parity:
    """|engine - trainer| over the sampled tokens, in nats; `kl` is the k3 estimate of KL(engine || trainer)."""

    tokens: int
    max_abs: float
    mean_abs: float
    kl: float
    version: int
    exact: bool

    @property
    def agrees(self) -> bool:
        """True if rounding explains the difference."""
        return self.max_abs <= LIMIT_FP32 if self.exact else self.mean_abs <= LIMIT_BF16

    def require(self) -> Parity:
        """Return self, or raise RunError if the log-probs disagree."""
        if not self.agrees:
            limit = f"max {LIMIT_FP32:g}" if self.exact else f"mean {LIMIT_BF16:g}"
            raise RunError(
                f"engine and trainer disagree after the push of version {self.version}: log-probs of {self.tokens} "
                f"tokens differ by {self.mean_abs:.2g} on average and {self.max_abs:.2g} at most (limit: {limit}). The "
                "engine did not take all weights, or computes another model; `or1 doctor CONFIG` shows whether it does "
                'before any update. rollout.engine = "hf" shares the weights'
            )
        return self

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the check by name."""
        return {"mismatch/check_max": self.max_abs, "mismatch/check_mean": self.mean_abs}


def push_weights(
    engine: Engine, model: PreTrainedModel, state: TrainState, prompts: Sequence[Prompt], config: Config
) -> dict[str, float]:
    """Push the model's weights to the engine as the next version, and verify them every rollout.verify_every pushes.

    prompts  of the last rollout: an engine that kept a cache of old weights kept it for these

    Returns metrics of the engine and of the check, if there are any. Collective.
    Raises RunError if engine and trainer disagree.
    """
    version = state.policy_version + 1
    engine.update_weights(version)
    state.policy_version = version
    found: dict[str, float] = engine.metrics() if isinstance(engine, MeteredEngine) else {}
    every = config.rollout.verify_every
    if engine.shares_weights or not every or version % every:
        return found
    return found | compare_engine(engine, model, prompts, config).require().metrics()


def compare_engine(engine: Engine, model: PreTrainedModel, prompts: Sequence[Prompt], config: Config) -> Parity:
    """Sample a few responses and score them with the trainer; nothing is trained."""
    room = config.optim.max_tokens_per_rank - config.data.max_prompt_tokens
    limit = min(TOKENS, room, *(stage.max_response_tokens for stage in config.stage))
    # Never top_p or top_k: log-probs among the likeliest tokens are not the trainer's.
    sampling = Sampling(config.rollout.temperature, limit, SAMPLES, seed=engine.version)
    chosen = list(prompts[:PROMPTS])
    found = list(engine.generate(chosen, sampling))
    sequences = [TrainSequence(chosen[f.prompt].token_ids, f.response.token_ids, f.response.logp, 0.0) for f in found]
    # One row, whatever was sampled: every rank must run as many forwards as the others.
    policy = Policy(model, RowBudget(sum(s.packed_tokens for s in sequences)), config.rollout.temperature)
    trainer = np.concatenate(score(policy, sequences)).astype(np.float64)
    drift = trainer - np.concatenate([s.rollout_logp for s in sequences])
    return Parity(
        tokens=len(drift),
        max_abs=float(np.abs(drift).max()),
        mean_abs=float(np.abs(drift).mean()),
        kl=float((np.expm1(drift) - drift).mean()),
        version=engine.version,
        exact=model.dtype in (torch.float32, torch.float64),
    )


def require_rounding(stats: UpdateStats, engine: Engine, config: Config, step: int, world: World) -> None:
    """Raise RunError if what the embedded engine sampled is not what the trainer computes for it. Collective.

    `stats` are those of the first update after a rollout with the present weights: from the second on they differ. With
    loss.is_cap a mismatch is expected and weighed, so nothing is checked.
    """
    if not engine.shares_weights or config.loss.is_cap is not None:
        return
    mine = torch.as_tensor(stats.sums.get("mismatch/kl", 0.0), dtype=torch.float64, device="cpu")
    kl, tokens = world.sum(torch.stack([mine, torch.tensor(float(stats.tokens), dtype=torch.float64)])).tolist()
    limit = LIMIT_KL[config.model.dtype]
    # NaN is left to optim.max_nonfinite_steps.
    if not tokens or not kl / tokens > limit:
        return
    raise RunError(
        f"step {step}: engine and trainer share their weights, but disagree about what was sampled: mismatch/kl is "
        f"{kl / tokens:.2g} over {tokens:.0f} tokens (limit in {config.model.dtype}: {limit:g}). Gradients are wrong. "
        "Likely causes: dropout or other noise in training, an attention that is not or1's, documents of a packed row "
        'that see each other, a model or config changed by hand. See whether optim.share_prompts = "off" or '
        'model.attention = "sdpa" helps, and report the architecture'
    )
