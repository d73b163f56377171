"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): the ranks of a group share one packed row.

Each holds a slice of the row's tokens everywhere but in attention. There, an all-to-all turns [all heads, T/S tokens]
into [heads/S, all T tokens], attention runs on whole documents as on one rank, and a second all-to-all turns back.
"""

# T packed tokens of a row, S ranks of a group, Q query or key-value heads, D head dimension, N trained tokens

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from or1.dist import DistError, World
from or1.pack import Microbatch


def check_heads(config: PretrainedConfig, size: int) -> None:
    """Raise DistError unless every rank of a group gets whole heads."""
    query = config.num_attention_heads
    key = getattr(config, "num_key_value_heads", None) or query
    for name, heads in (("attention heads", query), ("key-value heads", key)):
        if heads % size:
            raise DistError(
                f"dist.sequence_parallel = {size} does not divide the model's {heads} {name}; each rank needs whole "
                f"heads. Choose a common divisor of {query} and {key}"
            )


def my_slice(batch: Microbatch, world: World) -> Microbatch:
    """This rank's part of a packed row: its tokens, and the trained tokens whose hidden state it computes.

    `cu_seqlens` stays that of the whole row, which attention sees; where T is no multiple of S, a document of padding
    that nothing is trained on fills the row up.
    """
    size = world.sequence_size
    if size == 1:
        return batch
    padding = -len(batch.ids_T) % size
    if padding:
        batch = replace(
            batch,
            ids_T=torch.nn.functional.pad(batch.ids_T, (0, padding)),
            positions_T=torch.cat([batch.positions_T, torch.arange(padding, device=batch.positions_T.device)]),
            cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + padding]),
            max_seqlen=max(batch.max_seqlen, padding),
        )
    width = len(batch.ids_T) // size
    first = world.sequence_rank * width
    mine_N = (batch.rows_N >= first) & (batch.rows_N < first + width)
    return replace(
        batch,
        ids_T=batch.ids_T[first : first + width],
        positions_T=batch.positions_T[first : first + width],
        rows_N=batch.rows_N[mine_N] - first,
        targets_N=batch.targets_N[mine_N],
        advantages_N=batch.advantages_N[mine_N],
        rollout_logp_N=batch.rollout_logp_N[mine_N],
        old_logp_N=None if batch.old_logp_N is None else batch.old_logp_N[mine_N],
    )


def join_rows(values_N: Tensor, world: World) -> Tensor:
    """The values of a whole row's trained tokens from those of each rank's slice, in order. No gradient."""
    if world.sequence_size == 1:
        return values_N
    group = world.sequence_group
    lengths = [torch.zeros(1, dtype=torch.int64, device=values_N.device) for _ in range(world.sequence_size)]
    dist.all_gather(lengths, torch.tensor([len(values_N)], device=values_N.device), group=group)
    width = max(int(n) for n in lengths)
    parts = [values_N.new_empty(width) for _ in lengths]
    dist.all_gather(parts, torch.nn.functional.pad(values_N, (0, width - len(values_N))), group=group)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])


def to_all_tokens(x_TQD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T/S, Q, D], this rank's tokens, to [T, Q/S, D], this rank's heads."""
    size, (tokens, heads, width) = group.size(), x_TQD.shape
    sent = x_TQD.view(tokens, size, heads // size, width).transpose(0, 1)
    return _AllToAll.apply(sent, group).reshape(size * tokens, heads // size, width)


def to_all_heads(x_TQD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, Q/S, D], this rank's heads, to [T/S, Q, D], this rank's tokens."""
    size, (tokens, heads, width) = group.size(), x_TQD.shape
    received = _AllToAll.apply(x_TQD.view(size, tokens // size, heads, width), group)
    return received.transpose(0, 1).reshape(tokens // size, size * heads, width)


class _AllToAll(torch.autograd.Function):
    """Block i of dimension 0 goes to rank i; its own inverse, so backward is the same exchange."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.group), None


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out
