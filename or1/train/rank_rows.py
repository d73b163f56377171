"""The policy, and this rank's packed rows of an update."""

# T packed tokens of a row, N trained tokens of a row

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from or1.core.types import TrainSequence
from or1.dist.oom_peers import row_on_all_ranks
from or1.dist.oom_retry import RowBudget
from or1.dist.world import SINGLE, World
from or1.model.routers import Routers
from or1.model.row_plan import plan_ranks
from or1.model.rows import Microbatch, pack_rows, units_of
from or1.model.shared_prompts import Sharing
from or1.model.slices import my_slice
from or1.rollout.collect import Progress, no_progress
from or1_kernels.objective import PolicyObjective
from or1_kernels.options import HeadOptionsDict

T = TypeVar("T")


@dataclass(frozen=True)
class Policy:
    """A model, and how its packed rows are computed. The reference model is a Policy too.

    model          with an LMHead (or1.model.load)
    budget         most tokens of a packed row, shared by all policies of a run
    temperature    of sampling; log-probabilities are those of the policy that samples
    objective      token objective of an update
    sharing        whether responses to one prompt share its tokens in a row
    world          ranks that share the rows
    old_is_engine  True if `old_logp` of the sequences came from the engine and not from this model
    progress       called with (rows done, rows)
    head           implementation options of the LM head (impl, preset, chunk_rows)
    routers        routers of a mixture-of-experts model; None for other models
    adapters       False: the frozen weights alone compute, as the reference model of a run with [model.lora]
    """

    model: PreTrainedModel
    budget: RowBudget
    temperature: float = 1.0
    objective: PolicyObjective = field(default_factory=PolicyObjective)
    sharing: Sharing = "off"
    world: World = SINGLE
    old_is_engine: bool = False
    progress: Progress = no_progress
    head: HeadOptionsDict = field(default_factory=HeadOptionsDict)
    routers: Routers | None = None
    adapters: bool = True

    @property
    def float_dtype(self) -> torch.dtype:
        """Dtype of advantages and log-probs: fp32, or fp64 for an fp64 model."""
        return torch.promote_types(self.model.dtype, torch.float32)


def rank_rows(
    policy: Policy, sequences: Sequence[TrainSequence], max_tokens: int
) -> list[tuple[list[int], Microbatch]]:
    """Return this rank's packed rows, each with the indices of its sequences. Every rank gets equally many rows."""
    world, units = policy.world, units_of(sequences, max_tokens, policy.sharing)
    plan = plan_ranks([unit.tokens for unit in units], max_tokens, world.data_size)[world.data_rank]
    rows = [[units[u] for u in row] for row in plan]
    packed = pack_rows(sequences, rows, policy.model.device, policy.float_dtype)
    indices = [[i for unit in row for i in unit.members] for row in rows]
    return list(zip(indices, packed, strict=True))


def on_all_ranks(policy: Policy, work: Callable[[Microbatch], T], row: Microbatch) -> T:
    """Return `work(row)` while the other ranks work on their rows; `row` is this rank's slice. Collective.

    Raises RowMemoryError if a rank ran out of memory (or1.dist.oom_peers).
    """
    return row_on_all_ranks(policy.model, policy.world, len(row.ids_T), work, row, partial(_anchor, policy))


def longest_of(sequences: Sequence[TrainSequence]) -> int:
    """Return the packed tokens of the longest sequence, 1 for none."""
    return max((s.packed_tokens for s in sequences), default=1)


def _anchor(policy: Policy) -> Microbatch:
    """Return this rank's slice of an anchor row: one untrained token, with the collective calls of any other row."""
    (anchor,) = pack_rows([], [[]], policy.model.device, policy.float_dtype)
    return my_slice(anchor, policy.world)
