"""The forward of a packed row with the routers of a mixture-of-experts model, and the load of an update's experts."""

# T packed tokens of a row, H hidden

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from or1.model.forward import hidden_states
from or1.model.rows import Microbatch, keep_known
from or1.model.slices import my_slice
from or1.train.rank_rows import Policy, on_all_ranks


def decoded(policy: Policy, batch: Microbatch) -> Tensor:
    """Return the hidden states of a packed row, float[T, H]; the policy's routers note what they decide."""
    if policy.routers is None:
        return hidden_states(policy.model, batch, policy.world.sequence_group)
    with policy.routers.row(batch):
        return hidden_states(policy.model, batch, policy.world.sequence_group)


def balance_experts(policy: Policy, rows: Sequence[Microbatch]) -> None:
    """Prepare the routers for the rows of an update. With a load-balancing loss, first count the load. Collective.

    The load of all rows is needed before the first backward, so that the loss does not depend on the packing.
    """
    if policy.routers is None:
        return
    policy.routers.begin()
    if policy.routers.coef:
        for row in rows:
            on_all_ranks(policy, partial(_count, policy), keep_known(my_slice(row, policy.world)))
        policy.routers.begin(policy.routers.shares(policy.world))


def _count(policy: Policy, batch: Microbatch) -> None:
    with torch.no_grad():
        decoded(policy, batch)
