"""Ranks under torchrun that share one copy of the model in vLLM (tensor parallelism by its external launcher).

Each of them runs the same scheduler over the same requests, so each must be given the requests of all, in one order,
and must step and abort when the others do. A rank keeps only the responses to its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from or1.core.errors import EngineError
from or1.core.types import Response
from or1.rollout.engine import Job


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a model. `group` is their process group, None if each has its own."""

    size: int = 1
    rank: int = 0
    group: Any = None
    launched: bool = False

    @classmethod
    def of(cls, tensor_parallel: int) -> Ranks:
        """Neighbouring ranks share a model. Raises EngineError if torchrun's ranks do not divide that way."""
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
            # Every rank takes part in making every group. gloo: these messages are small and live on the host.
            group = dist.new_group(ranks, backend="gloo")
            own = group if dist.get_rank() in ranks else own
        return cls(tensor_parallel, dist.get_rank() % tensor_parallel, own, launched=True)

    def engine_options(self) -> dict[str, Any]:
        """vLLM's arguments under torchrun, whose ranks it then takes as they are."""
        return {"distributed_executor_backend": "external_launcher"} if self.launched else {}

    def share(self, jobs: list[Job]) -> Sequence[Job | _SharedJob]:
        """The jobs of all ranks of the group, in rank order."""
        if self.size == 1:
            return jobs
        rows = [np.array([j.max_new, j.seed, len(j.context_ids), *j.context_ids], np.int64) for j in jobs]
        flat = np.concatenate([np.array([len(rows)], np.int64), *rows])
        parts = self._gather(torch.from_numpy(flat))
        shared: list[Job | _SharedJob] = []
        for rank, part in enumerate(parts):
            if rank == self.rank:
                shared += jobs
                continue
            at = 1
            for _ in range(int(part[0])):
                max_new, seed, length = (int(value) for value in part[at : at + 3])
                shared.append(_SharedJob(part[at + 3 : at + 3 + length].numpy(), max_new, seed))
                at += 3 + length
        return shared

    def agree(self, late: bool) -> bool:
        """Whether the first rank of the group is late."""
        if self.size == 1:
            return late
        flag = torch.tensor([late], dtype=torch.uint8)
        dist.broadcast(flag, group=self.group, group_src=0)
        return bool(flag.item())

    def owns(self, job: Job | _SharedJob) -> bool:
        """Whether a job of `share` is this rank's own."""
        return isinstance(job, Job)

    def _gather(self, flat: torch.Tensor) -> list[torch.Tensor]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(flat)]), group=self.group)
        longest = int(max(sizes))
        parts = [torch.zeros(longest, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(parts, torch.nn.functional.pad(flat, (0, longest - len(flat))), group=self.group)
        return parts


class _SharedJob(NamedTuple):
    """A job of another rank: only what vLLM needs of it."""

    context_ids: np.ndarray
    max_new: int
    seed: int
    begun: Response | None = None
