"""Tokens whose log-probability the engine reported as NaN or infinite: they are left out, and counted.

Nothing is known of the policy that sampled such a token: it may not enter an importance weight, an old log-prob, or
the entropy that steers the controller. The rest of its response is trained as ever.
"""

# N trained tokens of a row

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from or1.pack import Microbatch, TrainSequence
from or1.types import Group


def known_tokens(sequences: Iterable[TrainSequence]) -> int:
    """Tokens that an update on these sequences sums over."""
    return sum(int(np.isfinite(s.rollout_logp).sum()) for s in sequences)


def unknown_tokens(groups: Sequence[Group]) -> int:
    """Tokens of these groups that are left out."""
    return sum(int((~np.isfinite(r.logp)).sum()) for group in groups for r in group.responses)


def is_known(group: Group) -> bool:
    """Whether anything of a group can be trained."""
    return any(np.isfinite(r.logp).any() for r in group.responses)


def keep_known(batch: Microbatch) -> Microbatch:
    """A packed row without those tokens among the trained ones; as context of later tokens they stay."""
    known_N = batch.rollout_logp_N.isfinite()
    if known_N.all():
        return batch
    return replace(
        batch,
        rows_N=batch.rows_N[known_N],
        targets_N=batch.targets_N[known_N],
        advantages_N=batch.advantages_N[known_N],
        rollout_logp_N=batch.rollout_logp_N[known_N],
        old_logp_N=None if batch.old_logp_N is None else batch.old_logp_N[known_N],
    )
