"""Vocabulary parallelism: each rank holds V rows of the weight, and two small all-reduces join a chunk.

Legend: C rows of a chunk, N rows, V vocabulary rows of this rank.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..rows import D_FLOOR, RowSums


@dataclass(frozen=True)
class VocabShard:
    """Rows [start, start + size) of the vocabulary, held by this rank of `group`.

    Every rank of the group holds `size` rows, in rank order. Pad the last shard with rows of bias -inf.
    """

    group: dist.ProcessGroup
    start: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup, size: int) -> "VocabShard":
        """Return the shard of this process in `group`, with `size` rows on each rank."""
        return cls(group, dist.get_rank(group) * size, size)

    def local(self, targets_N: Tensor) -> Tensor:
        """Return token ids relative to this shard, -1 where another rank holds the token."""
        here_N = (targets_N >= self.start) & (targets_N < self.start + self.size)
        return torch.where(here_N, targets_N - self.start, -1)

    def join(self, sums: RowSums, inv_tau_C: Tensor) -> RowSums:
        """Return sums over the whole vocabulary from each rank's own: one MAX and one SUM of [2, C]."""
        ends_2C = torch.stack((sums.peak_C, sums.target_C))
        dist.all_reduce(ends_2C, dist.ReduceOp.MAX, group=self.group)
        peak_C, target_C = ends_2C
        # The offset becomes the global maximum, so d changes by `shift`, and moment = sum of d exp d changes too.
        shift_C = ((sums.peak_C - peak_C) * inv_tau_C).clamp_min(D_FLOOR)
        own_C = ((sums.target_C - sums.peak_C) * inv_tau_C).exp()
        moment_C = sums.moment_C + shift_C * (sums.rest_C + own_C)
        parts_2C = torch.stack((sums.rest_C, moment_C)) * shift_C.exp()
        self.sum_(parts_2C)
        return RowSums(peak_C, target_C, *parts_2C)

    def sum_(self, tensor: Tensor) -> None:
        """Sum over the ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
