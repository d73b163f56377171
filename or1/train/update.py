"""One optimizer step on the policy loss over packed rows (Skywork-OR1 report, Eq. 3.1)."""

# T packed tokens of a row, N trained tokens of a row, H hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from or1.core import faults
from or1.core.types import TrainSequence
from or1.dist.fsdp import local_shard
from or1.dist.oom_peers import row_on_all_ranks
from or1.dist.oom_retry import Budget
from or1.dist.world import SINGLE, World
from or1.magic.denominator import TOKEN_MEAN, Normaliser
from or1.magic.selection import Minibatch
from or1.model.forward import eval_mode, hidden_states, lm_head, trained_rows
from or1.model.row_plan import plan_ranks
from or1.model.rows import Microbatch, keep_known, pack_rows, units_of
from or1.model.shared_prompts import Sharing
from or1.model.slices import join_slices, my_slice
from or1.rollout.collect import Progress, no_progress
from or1.train.metrics import UpdateStats
from or1.train.optim import MasterAdamW
from or1_kernels.head import PolicyStats
from or1_kernels.objective import PolicyObjective

T = TypeVar("T")


@dataclass(frozen=True)
class UpdateSettings:
    """Constants of an update; `entropy_coef` is alpha of Eq. 3.1, `budget` the size of a packed row.

    `normaliser` says what the sum of the token losses is divided by; old_is_engine, whether old log-probs of the
    sequences are the engine's.
    """

    objective: PolicyObjective
    entropy_coef: float
    temperature: float
    budget: Budget
    sharing: Sharing = "off"
    progress: Progress = no_progress
    normaliser: Normaliser = TOKEN_MEAN
    world: World = SINGLE
    old_is_engine: bool = False


def update_policy(
    model: PreTrainedModel,
    optimizer: MasterAdamW,
    sequences: Sequence[TrainSequence],
    settings: UpdateSettings,
    stats: UpdateStats,
) -> bool:
    """One optimizer step; returns whether it was taken (a non-finite one is not) and adds its numbers to `stats`.

    The loss is a sum over tokens divided by a number of the whole update (Eq. 3.1: its trained tokens), so its gradient
    does not depend on how the sequences are packed: what runs out of memory is done again in smaller rows. Every
    rank is given all sequences of the update and trains its share of their rows; gradients and numbers are summed.
    """

    def attempt(max_tokens: int) -> tuple[torch.Tensor, UpdateStats]:
        # A row that failed in backward has left part of its gradient; the rows before it have left all of theirs.
        optimizer.zero_grad()
        return _accumulate_gradient(model, sequences, settings, max_tokens)

    total, rows = settings.budget.run(attempt, longest_of(sequences))
    stats.add_rows(rows)
    if faults.hit("train.gradient") == "inf":
        next(shard for p in model.parameters() if (shard := local_shard(p.grad)).numel()).view(-1)[0] = torch.inf
    total = settings.world.sum(total)
    result = optimizer.step_if_finite(total)
    stats.add_update(float(total), result)
    return result.took


def _accumulate_gradient(
    model: PreTrainedModel, sequences: Sequence[TrainSequence], settings: UpdateSettings, max_tokens: int
) -> tuple[torch.Tensor, UpdateStats]:
    """Forward and backward of every packed row; the loss, and the rows' numbers."""
    denominator = sum(settings.normaliser.units(s.known_tokens) for s in sequences if s.known_tokens)
    total, stats = torch.zeros((), dtype=torch.float64, device=model.device), UpdateStats()
    packs = _my_rows(model, sequences, settings, max_tokens)
    for done, (_, row) in enumerate(packs):
        settings.progress(done, len(packs))
        batch = keep_known(my_slice(row, settings.world))
        loss, row_stats = _on_all_ranks(model, batch, settings, lambda b: _train_row(model, b, settings, denominator))
        total += loss
        stats.add_row(batch, row_stats, settings.old_is_engine)
    return total, stats


def _train_row(
    model: PreTrainedModel, batch: Microbatch, settings: UpdateSettings, denominator: float
) -> tuple[torch.Tensor, PolicyStats]:
    """Forward and backward of a row; its part of the loss, and the numbers of its tokens."""
    faults.hit("train.forward")
    hidden_TH = hidden_states(model, batch, settings.world.sequence_group)
    loss, stats = lm_head(model)(
        trained_rows(hidden_TH, batch),
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
    faults.hit("train.backward")
    loss.backward()
    return loss.detach(), stats


def _on_all_ranks(
    model: PreTrainedModel, batch: Microbatch, settings: UpdateSettings, work: Callable[[Microbatch], T]
) -> T:
    """`work` on this rank's slice of a row; see `row_on_all_ranks`."""

    def stand_in() -> None:
        (anchor,) = pack_rows([], [[]], model.device, _float_dtype(model))
        work(my_slice(anchor, settings.world))

    return row_on_all_ranks(model, settings.world, len(batch.ids_T), lambda: work(batch), stand_in)


def prepared(
    batches: Sequence[Minibatch],
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    settings: UpdateSettings,
    old_logp: Literal["none", "recompute", "rollout"],
) -> list[Minibatch]:
    """The same minibatches with the log-probs that the objective compares with: old ones, and a reference's if any."""
    sequences_of = [batch.sequences for batch in batches]
    if old_logp == "rollout":
        sequences_of = [[replace(s, old_logp=s.rollout_logp) for s in sequences] for sequences in sequences_of]
    elif old_logp == "recompute":
        sequences_of = [with_old_logp(model, sequences, settings) for sequences in sequences_of]
    if reference is not None:
        sequences_of = [with_ref_logp(reference, sequences, settings) for sequences in sequences_of]
    return [replace(batch, sequences=s) for batch, s in zip(batches, sequences_of, strict=True)]


def with_old_logp(
    model: PreTrainedModel, sequences: Sequence[TrainSequence], settings: UpdateSettings
) -> list[TrainSequence]:
    """The same sequences with the present policy's log-probabilities as `old_logp`, where `score` gives some."""
    return [replace(s, old_logp=x) for s, x in zip(sequences, score(model, sequences, settings), strict=True)]


def with_ref_logp(
    reference: PreTrainedModel, sequences: Sequence[TrainSequence], settings: UpdateSettings
) -> list[TrainSequence]:
    """The same sequences with the reference model's log-probabilities as `ref_logp`, where `score` gives some."""
    return [replace(s, ref_logp=x) for s, x in zip(sequences, score(reference, sequences, settings), strict=True)]


def score(model: PreTrainedModel, sequences: Sequence[TrainSequence], settings: UpdateSettings) -> list[np.ndarray]:
    """Log-probability of every trained token, float[L] a sequence, packed as the update packs them; no gradients.

    Every rank scores its share of the rows and gets all: an update that runs out of memory deals the rows out anew.
    Collective.
    """

    def score_row(batch: Microbatch) -> torch.Tensor:
        hidden_NH = trained_rows(hidden_states(model, batch, settings.world.sequence_group), batch)
        return lm_head(model)(hidden_NH, batch.targets_N, temperature=settings.temperature)[0]

    def attempt(max_tokens: int) -> dict[int, np.ndarray]:
        scored: dict[int, np.ndarray] = {}
        for indices, row in _my_rows(model, sequences, settings, max_tokens):
            logp_N = _on_all_ranks(model, my_slice(row, settings.world), settings, score_row)
            parts = join_slices(logp_N, row, settings.world).split([sequences[i].trained_tokens for i in indices])
            for i, part in zip(indices, parts, strict=True):
                scored[i] = part.cpu().numpy()
        return scored

    with eval_mode(model):
        scored = settings.budget.run(attempt, longest_of(sequences))
    return _gather_scores(scored, sequences, settings.world)


def _gather_scores(scored: dict[int, np.ndarray], sequences: Sequence[TrainSequence], world: World) -> list[np.ndarray]:
    """The scores of all ranks, in the order of the sequences."""
    # Ranks of a sequence group have the same.
    own = scored if world.sequence_rank == 0 else {}
    values = np.concatenate([np.empty(0, np.float32), *own.values()])
    parts = (np.array([*own], np.int64).tobytes(), values.dtype.str.encode(), values.tobytes())
    found: dict[int, np.ndarray] = {}
    for indices, dtype, numbers in zip(*(world.gather(part) for part in parts), strict=True):
        order = np.frombuffer(indices, np.int64).tolist()
        ends = np.cumsum([sequences[i].trained_tokens for i in order])
        found |= zip(order, np.split(np.frombuffer(numbers, dtype.decode()), ends[:-1]), strict=False)
    return [found[i] for i in range(len(sequences))]


def _my_rows(
    model: PreTrainedModel, sequences: Sequence[TrainSequence], settings: UpdateSettings, max_tokens: int
) -> list[tuple[list[int], Microbatch]]:
    """This rank's packed rows with the indices of their sequences; as many on every rank."""
    world, units = settings.world, units_of(sequences, max_tokens, settings.sharing)
    plan = plan_ranks([unit.tokens for unit in units], max_tokens, world.data_size)[world.data_rank]
    rows = [[units[u] for u in row] for row in plan]
    packed = pack_rows(sequences, rows, model.device, _float_dtype(model))
    indices = [[i for unit in row for i in unit.members] for row in rows]
    return list(zip(indices, packed, strict=True))


def longest_of(sequences: Sequence[TrainSequence]) -> int:
    """Packed tokens of the longest sequence, 1 for none."""
    return max((s.packed_tokens for s in sequences), default=1)


def _float_dtype(model: PreTrainedModel) -> torch.dtype:
    """Advantages and log-probs are fp32, or fp64 for an fp64 model."""
    return torch.promote_types(model.dtype, torch.float32)
