"""One optimizer step on the policy loss (Skywork-OR1 report, Eq. 3.1)."""

# T packed tokens of a row, N trained tokens of a row, H hidden

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from or1.core import faults
from or1.core.types import TrainSequence
from or1.dist.fsdp import local_shard, sum_replicas
from or1.magic.denominator import TOKEN_MEAN, Normaliser
from or1.model.forward import lm_head, trained_rows
from or1.model.rows import Microbatch, keep_known
from or1.model.slices import my_slice
from or1.train.experts import balance_experts, decoded
from or1.train.metrics import UpdateStats
from or1.train.optim import MasterAdamW
from or1.train.rank_rows import Policy, longest_of, on_all_ranks, rank_rows
from or1_kernels.head import PolicyStats


def update(
    policy: Policy,
    optimizer: MasterAdamW,
    sequences: Sequence[TrainSequence],
    alpha: float,
    stats: UpdateStats,
    normaliser: Normaliser = TOKEN_MEAN,
) -> bool:
    """Take one optimizer step on L - alpha H. Return False if it was skipped for a non-finite loss or gradient.

    The loss is a sum over tokens, divided by one number of the whole update (Eq. 3.1: its trained tokens). So the
    gradient does not depend on packing, and an update that runs out of memory is retried in shorter rows. Every rank
    is given all sequences and trains its rows; losses and gradients are summed over ranks. Collective.

    alpha       entropy coefficient of Eq. 3.1
    normaliser  what the sum of the token losses is divided by
    stats       gets the numbers of this update

    Raises MemoryLimitError if the longest sequence does not fit into memory.
    """
    denominator = sum(normaliser.units(s.known_tokens) for s in sequences if s.known_tokens)
    train = partial(_train_row, policy, optimizer, alpha, normaliser, denominator)
    for attempt in policy.budget.attempts(longest_of(sequences)):
        with attempt:
            # A failed backward has left part of its gradient.
            optimizer.zero_grad()
            loss, row_stats = torch.zeros((), dtype=torch.float64, device=policy.model.device), UpdateStats()
            rows = rank_rows(policy, sequences, attempt.max_tokens)
            balance_experts(policy, [row for _, row in rows])
            for done, (_, row) in enumerate(rows):
                policy.progress(done, len(rows))
                batch = keep_known(my_slice(row, policy.world))
                row_loss, token_stats = on_all_ranks(policy, train, batch)
                loss += row_loss
                row_stats.add_row(batch, token_stats, policy.objective, policy.old_is_engine)
    sum_replicas(optimizer.gradients().values(), policy.world)
    stats.add_rows(row_stats)
    if policy.routers is not None:
        stats.routing.append(policy.routers.metrics(policy.world))
    faults.poison("train.gradient", (local_shard(p.grad) for p in policy.model.parameters() if p.grad is not None))
    total = policy.world.sum(loss)
    result = optimizer.step_if_finite(total)
    stats.add_update(float(total), result)
    return result.took


def _train_row(
    policy: Policy, optimizer: MasterAdamW, alpha: float, normaliser: Normaliser, denominator: float, batch: Microbatch
) -> tuple[Tensor, PolicyStats]:
    """Run forward and backward of a row. Return its part of the loss, f64[] without gradient, and token statistics."""
    faults.hit("train.forward")
    hidden_TH = decoded(policy, batch)
    loss, stats = lm_head(policy.model)(
        trained_rows(hidden_TH, batch),
        batch.targets_N,
        advantages=batch.advantages_N,
        token_weight=normaliser.weights(batch.lengths_N) / denominator,
        old_logp=batch.old_logp_N,
        ref_logp=batch.ref_logp_N,
        sequences=batch.sequences_N,
        rollout_logp=None if policy.objective.is_cap is None else batch.rollout_logp_N,
        objective=policy.objective,
        entropy_coef=alpha,
        temperature=policy.temperature,
        main_grad=optimizer.main_grad(lm_head(policy.model).weight),
        **policy.head,
    )
    faults.hit("train.backward")
    balance = None if policy.routers is None else policy.routers.loss()
    (loss if balance is None else loss + balance).backward()
    return loss.detach(), stats
