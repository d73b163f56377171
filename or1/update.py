"""One optimizer step on the policy loss over packed rows (Skywork-OR1 report, Eq. 3.1)."""

# T packed tokens of a row, N trained tokens of a row, H hidden

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from or1.budget import Budget
from or1.model import eval_mode, hidden_states, lm_head
from or1.normalise import TOKEN_MEAN, Normaliser
from or1.optim import MasterAdamW
from or1.pack import TrainSequence, pack, pack_indexed
from or1.prefix import Sharing
from or1.rollout.collect import Progress, no_progress
from or1.step_metrics import UpdateStats
from or1_kernels.objective import PolicyObjective


@dataclass(frozen=True)
class UpdateSettings:
    """Constants of an update; `entropy_coef` is alpha of Eq. 3.1, `budget` the size of a packed row.

    `normaliser` says what the sum of the token losses is divided by.
    """

    objective: PolicyObjective
    entropy_coef: float
    temperature: float
    budget: Budget
    sharing: Sharing = "off"
    progress: Progress = no_progress
    normaliser: Normaliser = TOKEN_MEAN


def update_policy(
    model: PreTrainedModel,
    optimizer: MasterAdamW,
    sequences: Sequence[TrainSequence],
    settings: UpdateSettings,
    stats: UpdateStats,
) -> bool:
    """One optimizer step; returns whether it was taken (a non-finite one is not) and adds its numbers to `stats`.

    The loss is a sum over tokens divided by a number of the whole update (Eq. 3.1: its trained tokens), so its gradient
    does not depend on how the sequences are packed: what runs out of memory is done again in smaller rows.
    """

    def attempt(max_tokens: int) -> tuple[torch.Tensor, UpdateStats]:
        # A row that failed in backward has left part of its gradient; the rows before it have left all of theirs.
        optimizer.zero_grad()
        return _accumulate_gradient(model, sequences, settings, max_tokens)

    total, rows = settings.budget.run(attempt, longest_of(sequences))
    stats.add_rows(rows)
    result = optimizer.step_if_finite(total)
    stats.add_update(float(total), result)
    return result.took


def _accumulate_gradient(
    model: PreTrainedModel, sequences: Sequence[TrainSequence], settings: UpdateSettings, max_tokens: int
) -> tuple[torch.Tensor, UpdateStats]:
    """Forward and backward of every packed row; the loss, and the rows' numbers."""
    denominator = sum(settings.normaliser.units(s.trained_tokens) for s in sequences)
    total, stats = torch.zeros((), dtype=torch.float64, device=model.device), UpdateStats()
    packs = pack(sequences, max_tokens, model.device, _float_dtype(model), settings.sharing)
    for done, batch in enumerate(packs):
        settings.progress(done, len(packs))
        hidden_TH = hidden_states(model, batch)
        loss, row_stats = lm_head(model)(
            hidden_TH[batch.rows_N],
            batch.targets_N,
            advantages=batch.advantages_N,
            token_weight=settings.normaliser.weights(batch.lengths_N) / denominator,
            old_logp=batch.old_logp_N,
            ref_logp=batch.ref_logp_N,
            rollout_logp=None if settings.objective.is_cap is None else batch.rollout_logp_N,
            objective=settings.objective,
            entropy_coef=settings.entropy_coef,
            temperature=settings.temperature,
        )
        loss.backward()
        total += loss.detach()
        stats.add_row(batch, row_stats)
    return total, stats


def with_old_logp(
    model: PreTrainedModel, sequences: Sequence[TrainSequence], settings: UpdateSettings
) -> list[TrainSequence]:
    """The same sequences with the present policy's log-probabilities as `old_logp`."""
    return [replace(s, old_logp=x) for s, x in zip(sequences, score(model, sequences, settings), strict=True)]


def with_ref_logp(
    reference: PreTrainedModel, sequences: Sequence[TrainSequence], settings: UpdateSettings
) -> list[TrainSequence]:
    """The same sequences with the reference model's log-probabilities as `ref_logp`."""
    return [replace(s, ref_logp=x) for s, x in zip(sequences, score(reference, sequences, settings), strict=True)]


def score(
    model: PreTrainedModel, sequences: Sequence[TrainSequence], settings: UpdateSettings
) -> list[np.ndarray]:
    """Log-probability of every trained token, float[L] a sequence, packed as the update packs them; no gradients."""

    def attempt(max_tokens: int) -> dict[int, np.ndarray]:
        scored: dict[int, np.ndarray] = {}
        packs = pack_indexed(sequences, max_tokens, model.device, _float_dtype(model), settings.sharing)
        for indices, batch in packs:
            hidden_NH = hidden_states(model, batch)[batch.rows_N]
            logp_N, _ = lm_head(model)(hidden_NH, batch.targets_N, temperature=settings.temperature)
            parts = logp_N.split([sequences[i].trained_tokens for i in indices])
            for i, part in zip(indices, parts, strict=True):
                scored[i] = part.cpu().numpy()
        return scored

    with eval_mode(model):
        scored = settings.budget.run(attempt, longest_of(sequences))
    return [scored[i] for i in range(len(sequences))]


def longest_of(sequences: Sequence[TrainSequence]) -> int:
    """Packed tokens of the longest sequence, 1 for none."""
    return max((s.packed_tokens for s in sequences), default=1)


def _float_dtype(model: PreTrainedModel) -> torch.dtype:
    """Advantages and log-probs are fp32, or fp64 for an fp64 model."""
    return torch.promote_types(model.dtype, torch.float32)
