"""Slices of a packed row for sequence parallelism, and the reassembly of per-token values."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from or1.dist.world import World
from or1.model.rows import Microbatch

# Fields of a Microbatch with one value per trained token, except `rows_N`.
_PER_TOKEN = ("targets_N", "advantages_N", "rollout_logp_N", "lengths_N", "sequences_N", "old_logp_N", "ref_logp_N")


def my_slice(batch: Microbatch, world: World) -> Microbatch:
    """Return this rank's slice of a packed row: its tokens, and the trained tokens whose hidden state it computes.

    Boundaries and shared keys stay those of the whole row, since attention runs over the whole row. If T is not a
    multiple of the sequence-parallel size, an untrained document of padding fills the row up.
    """
    size = world.sequence_size
    if size == 1:
        return batch
    padding = -len(batch.ids_T) % size
    if padding:
        filled = torch.arange(padding, device=batch.positions_T.device)
        batch = replace(
            batch,
            ids_T=torch.nn.functional.pad(batch.ids_T, (0, padding)),
            positions_T=torch.cat([batch.positions_T, filled]),
            cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + padding]),
            max_seqlen=max(batch.max_seqlen, padding),
            cu_keys=torch.cat([batch.cu_keys, batch.cu_keys[-1:] + padding]),
            max_keys=max(batch.max_keys, padding),
            kv_rows_U=None if batch.kv_rows_U is None else torch.cat([batch.kv_rows_U, filled + len(batch.ids_T)]),
        )
    width = len(batch.ids_T) // size
    first = world.sequence_rank * width
    mine_N = _is_mine(batch.rows_N, len(batch.ids_T), world)
    return replace(
        batch,
        ids_T=batch.ids_T[first : first + width],
        positions_T=batch.positions_T[first : first + width],
        rows_N=batch.rows_N[mine_N] - first,
        **{name: values[mine_N] for name in _PER_TOKEN if (values := getattr(batch, name)) is not None},
    )


def join_slices(values_N: Tensor, whole: Microbatch, world: World) -> Tensor:
    """Return float[N] of the whole row from the values of every rank's slice. No gradient. Collective."""
    if world.sequence_size == 1:
        return values_N
    tokens = -(-len(whole.ids_T) // world.sequence_size) * world.sequence_size
    joined = values_N.new_zeros(len(whole.rows_N))
    joined[_is_mine(whole.rows_N, tokens, world)] = values_N
    dist.all_reduce(joined, group=world.sequence_group)
    return joined


def _is_mine(rows_N: Tensor, tokens: int, world: World) -> Tensor:
    width = tokens // world.sequence_size
    return rows_N // width == world.sequence_rank
