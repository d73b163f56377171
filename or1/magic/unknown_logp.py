"""Tokens whose log-probability the engine reported as NaN or infinite: they are left out, and counted.

Nothing is known of the policy that sampled such a token: it may not enter an importance weight, an old log-prob, or
the entropy that steers the controller. The rest of its response is trained as ever.
"""

# N trained tokens of a row

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from or1.core.types import Group
from or1.model.rows import Microbatch


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
    per_token = ("rows_N", "targets_N", "advantages_N", "rollout_logp_N", "lengths_N", "old_logp_N", "ref_logp_N")
    present = {name: values for name in per_token if (values := getattr(batch, name)) is not None}
    return replace(batch, **{name: values[known_N] for name, values in present.items()})
