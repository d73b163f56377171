"""Log-probabilities that the objective compares with: the policy's own before an update, and the reference model's."""

# N trained tokens of a row

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor

from or1.core.types import TrainSequence
from or1.dist.world import World
from or1.model.forward import eval_mode, hidden_states, lm_head, trained_rows
from or1.model.lora.layers import adapters_off
from or1.model.rows import Microbatch
from or1.model.slices import join_slices, my_slice
from or1.train.rank_rows import Policy, longest_of, on_all_ranks, rank_rows


def with_old_logp(policy: Policy, sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
    """Return the sequences with the policy's current log-probabilities as `old_logp`."""
    return [replace(s, old_logp=logp) for s, logp in zip(sequences, score(policy, sequences), strict=True)]


def with_ref_logp(reference: Policy, sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
    """Return the sequences with the reference model's log-probabilities as `ref_logp`."""
    return [replace(s, ref_logp=logp) for s, logp in zip(sequences, score(reference, sequences), strict=True)]


def score(policy: Policy, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
    """Return the log-probability of every trained token, float[L] a sequence, without gradients. Collective.

    Rows are packed as in an update. Every rank scores its rows and gets the scores of all: an update that is retried
    after out-of-memory distributes the rows anew.
    """
    with eval_mode(policy.model), nullcontext() if policy.adapters else adapters_off(policy.model):
        for attempt in policy.budget.attempts(longest_of(sequences)):
            with attempt:
                scored: dict[int, np.ndarray] = {}
                for indices, row in rank_rows(policy, sequences, attempt.max_tokens):
                    logp_N = on_all_ranks(policy, partial(_score_row, policy), my_slice(row, policy.world))
                    lengths = [sequences[i].trained_tokens for i in indices]
                    parts = join_slices(logp_N, row, policy.world).split(lengths)
                    scored |= {i: part.cpu().numpy() for i, part in zip(indices, parts, strict=True)}
    return _gather(scored, sequences, policy.world)


def _score_row(policy: Policy, row: Microbatch) -> Tensor:
    hidden_NH = trained_rows(hidden_states(policy.model, row, policy.world.sequence_group), row)
    return lm_head(policy.model)(hidden_NH, row.targets_N, temperature=policy.temperature, **policy.head)[0]


def _gather(scored: dict[int, np.ndarray], sequences: Sequence[TrainSequence], world: World) -> list[np.ndarray]:
    """Return the scores of all ranks in the order of the sequences."""
    # The ranks of a sequence group hold the same scores.
    own = scored if world.sequence_rank == 0 else {}
    values = np.concatenate([np.empty(0, np.float32), *own.values()])
    parts = (np.array([*own], np.int64).tobytes(), values.dtype.str.encode(), values.tobytes())
    found: dict[int, np.ndarray] = {}
    for indices, dtype, numbers in zip(*(world.gather(part) for part in parts), strict=True):
        order = np.frombuffer(indices, np.int64).tolist()
        ends = np.cumsum([sequences[i].trained_tokens for i in order])
        found |= zip(order, np.split(np.frombuffer(numbers, dtype.decode()), ends[:-1]), strict=False)
    return [found[i] for i in range(len(sequences))]
