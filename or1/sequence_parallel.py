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
from or1.stand_in import ROW

# What a Microbatch holds for each trained token, beside its row.
_PER_TOKEN = ("targets_N", "advantages_N", "rollout_logp_N", "lengths_N", "old_logp_N", "ref_logp_N")


def check_heads(config: PretrainedConfig, size: int) -> None:
    """Raise DistError unless every rank of a group gets whole heads."""
    if size == 1:
        return
    config = config.get_text_config()
    query = getattr(config, "num_attention_heads", None)
    if not isinstance(query, int):
        raise DistError(f"dist.sequence_parallel = {size}, but {config.model_type} has no num_attention_heads in its "
                        "config; set it to 1")
    key = getattr(config, "num_key_value_heads", None) or query
    for name, heads in (("attention heads", query), ("key-value heads", key)):
        if heads % size:
            raise DistError(
                f"dist.sequence_parallel = {size} does not divide the model's {heads} {name}; each rank needs whole "
                f"heads. Choose a common divisor of {query} and {key}"
            )


def my_slice(batch: Microbatch, world: World) -> Microbatch:
    """This rank's part of a packed row: its tokens, and the trained tokens whose hidden state it computes.

    The boundaries and shared keys stay those of the whole row, which attention sees; where T is no multiple of S, a
    document of padding that nothing is trained on fills the row up.
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
    """float[N] of the whole row from the values of this rank's slice and of the others'. No gradient."""
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
    def forward(ctx, x_STQD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x_STQD, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.group), None


def _exchange(x_STQD: Tensor, group: dist.ProcessGroup) -> Tensor:
    tokens = x_STQD.shape[1]
    sent = x_STQD.contiguous()
    if ROW.slice_tokens:
        # A stand-in has few tokens; the others exchange whole slices.
        sent = torch.nn.functional.pad(sent, (0, 0, 0, 0, 0, ROW.slice_tokens - tokens))
    out = torch.empty_like(sent)
    if ROW.due():
        dist.all_to_all_single(out, sent, group=group)
    else:
        out.zero_()
    return out[:, :tokens]
