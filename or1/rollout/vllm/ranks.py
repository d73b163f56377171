"""Ranks under torchrun that share one model in vLLM: tensor parallelism with vLLM's external launcher.

Every rank of a group runs the same scheduler. So every rank must submit the requests of all ranks in the same order,
and must step and abort together with the others. A rank keeps only the responses to its own requests.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from or1.core.errors import EngineError
from or1.rollout.dealing import Dealt
from or1.rollout.engine import Job, Supply


class RankJob(NamedTuple):
    """A job of one of the ranks that share a model.

    job  for another rank's job, only `context_ids`, `max_new` and `seed` have a meaning
    own  True if this rank keeps the response
    """

    job: Job
    own: bool


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a model with this rank.

    size, rank  number of ranks that share the model, and this rank's index among them
    group       their process group; None without torchrun
    launched    True under torchrun
    """

    size: int = 1
    rank: int = 0
    group: Any = None
    launched: bool = False

    @classmethod
    def of(cls, tensor_parallel: int) -> Ranks:
        """Group neighbouring ranks by `tensor_parallel`. Collective.

        Raises EngineError if `tensor_parallel` does not divide the number of ranks.
        """
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if world % tensor_parallel:
            raise EngineError(
                f"rollout.vllm.tensor_parallel = {tensor_parallel} does not divide the {world} ranks; "
                'start with torchrun --nproc-per-node a multiple of it, or use placement = "server"'
            )
        if world == 1:
            return cls()
        own = None
        for first in range(0, world, tensor_parallel):
            ranks = list(range(first, first + tensor_parallel))
            # Collective: every rank makes every group. gloo, since these messages are small and in host memory.
            group = dist.new_group(ranks, backend="gloo")
            own = group if dist.get_rank() in ranks else own
        return cls(size=tensor_parallel, rank=dist.get_rank() % tensor_parallel, group=own, launched=True)

    def engine_options(self) -> dict[str, Any]:
        """Return vLLM's arguments for these ranks; under torchrun, vLLM uses the existing processes."""
        return {"distributed_executor_backend": "external_launcher"} if self.launched else {}

    def share(self, jobs: list[Job]) -> list[RankJob]:
        """Return the jobs of all ranks of the group, in rank order. Collective in the group."""
        mine = [RankJob(job, own=True) for job in jobs]
        if self.size == 1:
            return mine
        rows = [np.array([j.max_new, j.seed, len(j.context_ids), *j.context_ids], np.int64) for j in jobs]
        flat = np.concatenate([np.array([len(rows)], np.int64), *rows])
        parts = self._gather(torch.from_numpy(flat))
        shared: list[RankJob] = []
        for rank, part in enumerate(parts):
            if rank == self.rank:
                shared += mine
                continue
            at = 1
            for _ in range(int(part[0])):
                max_new, seed, length = (int(value) for value in part[at : at + 3])
                context_ids = part[at + 3 : at + 3 + length].numpy()
                job = Job(slot=(-1, -1), prompt_ids=context_ids, unfinished=None, max_new=max_new, seed=seed)
                shared.append(RankJob(job, own=False))
                at += 3 + length
        return shared

    def take(self, supply: Supply, room: int) -> list[RankJob]:
        """Return the next jobs of a supply, in the same order on every rank of the group. Collective in the group.

        Jobs that several groups share are claimed by the group's first rank, and its ranks keep the responses in turn.
        `room` must be equal in the group. Jobs of one caller are exchanged, all of them at once.
        """
        if self.size == 1:
            return [RankJob(job, own=True) for job in supply.take(room)]
        if not isinstance(supply, Dealt):
            return self.share(supply.take(sys.maxsize))
        claimed = supply.claim(room) if self.rank == 0 else []
        places = torch.zeros(room + 1, dtype=torch.int64)
        places[: len(claimed) + 1] = torch.tensor([len(claimed), *claimed])
        dist.broadcast(places, group=self.group, group_src=0)
        taken = places[1 : int(places[0]) + 1].tolist()
        return [RankJob(job, own=at % self.size == self.rank) for at in taken for job in supply.jobs([at])]

    def agree(self, late: bool) -> bool:
        """Return `late` of the group's first rank. Collective in the group."""
        if self.size == 1:
            return late
        flag = torch.tensor([late], dtype=torch.uint8)
        dist.broadcast(flag, group=self.group, group_src=0)
        return bool(flag.item())

    def _gather(self, flat: torch.Tensor) -> list[torch.Tensor]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(flat)]), group=self.group)
        longest = int(max(sizes))
        parts = [torch.zeros(longest, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(parts, torch.nn.functional.pad(flat, (0, longest - len(flat))), group=self.group)
        return parts
