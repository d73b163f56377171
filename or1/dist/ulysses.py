"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): the ranks of a group share one packed row.

Outside of attention, each rank holds a slice of the row's tokens. Before attention, an all-to-all turns
[all heads, T/S tokens] into [heads/S, all T tokens]. Attention then runs on whole documents, as on one rank. A second
all-to-all restores the slices.
"""

# T packed tokens of a row, S ranks of a group, Q query or key-value heads, D head dimension, N trained tokens

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from or1.core.errors import DistError
from or1.dist.oom_peers import ROW


def check_heads(config: PretrainedConfig, size: int) -> None:
    """Raise DistError unless the number of heads is divisible by the group's size."""
    if size == 1:
        return
    config = config.get_text_config()
    query = getattr(config, "num_attention_heads", None)
    if not isinstance(query, int):
        raise DistError(
            f"dist.sequence_parallel = {size}, but {config.model_type} has no num_attention_heads in its "
            "config; set it to 1"
        )
    key = getattr(config, "num_key_value_heads", None) or query
    for name, heads in (("attention heads", query), ("key-value heads", key)):
        if heads % size:
            raise DistError(
                f"dist.sequence_parallel = {size} does not divide the model's {heads} {name}; each rank needs whole "
                f"heads. Choose a common divisor of {query} and {key}"
            )


def to_all_tokens(x_TQD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange [T/S, Q, D], all heads of this rank's tokens, for [T, Q/S, D], this rank's heads of all tokens."""
    size, (tokens, heads, width) = group.size(), x_TQD.shape
    sent = x_TQD.view(tokens, size, heads // size, width).transpose(0, 1)
    return _AllToAll.apply(sent, group).reshape(size * tokens, heads // size, width)


def to_all_heads(x_TQD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange [T, Q/S, D], this rank's heads of all tokens, for [T/S, Q, D], all heads of this rank's tokens."""
    size, (tokens, heads, width) = group.size(), x_TQD.shape
    received = _AllToAll.apply(x_TQD.view(size, tokens // size, heads, width), group)
    return received.transpose(0, 1).reshape(tokens // size, size * heads, width)


class _AllToAll(torch.autograd.Function):
    """All-to-all of the blocks of dimension 0: block i goes to rank i. It is its own inverse, also in backward."""

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
        # Out of memory, this rank replaced its row by a few tokens, while the others exchange whole slices.
        sent = torch.nn.functional.pad(sent, (0, 0, 0, 0, 0, ROW.slice_tokens - tokens))
    out = torch.empty_like(sent)
    if ROW.due():
        dist.all_to_all_single(out, sent, group=group)
    else:
        out.zero_()
    return out[:, :tokens]
