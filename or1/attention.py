"""Attention over packed rows, registered with transformers as `or1_packed`.

A packed row [1, T] holds several documents; each must attend only to itself. transformers can isolate documents by
position ids alone, but only while no cache is made and no attention mask is given, and otherwise leaks in silence. So
the document boundaries travel with the call (`cu_seq_lens_q`), and this function never looks at masks or positions
when they are there. Without them (generation) it is transformers' own SDPA attention.
"""

# T packed tokens, S documents, L longest document, Q query heads, K key-value heads, D head dimension

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from or1.sequence_parallel import to_all_heads, to_all_tokens

NAME = "or1_packed"

_packed: ContextVar[bool] = ContextVar("or1_packed_forward", default=False)


@contextmanager
def packed_forward() -> Iterator[None]:
    """Inside, models with `or1_packed` attention build no mask: a [T, T] mask would outweigh the activations."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def _mask(*args: object, **kwargs: object) -> Tensor | None:
    return None if _packed.get() else sdpa_mask(*args, **kwargs)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sequence_group: ProcessGroup | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    if cu_seq_lens_q is None:
        if sliding_window is not None:
            kwargs["sliding_window"] = sliding_window
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if sliding_window is not None and max_length_q > sliding_window:
        raise NotImplementedError(
            f"packed attention has no sliding window, but the model's is {sliding_window} tokens and a document has "
            f"{max_length_q}; set use_sliding_window to false in the model's config.json"
        )
    q_TQD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    if sequence_group is not None:
        q_TQD, k_TKD, v_TKD = (to_all_tokens(x.contiguous(), sequence_group) for x in (q_TQD, k_TKD, v_TKD))
    out_TQD = padded_varlen_attention(q_TQD, k_TKD, v_TKD, cu_seq_lens_q, max_length_q, scaling)
    return (out_TQD if sequence_group is None else to_all_heads(out_TQD, sequence_group))[None], None


def padded_varlen_attention(
    q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None
) -> Tensor:
    """Causal attention within documents, exact on any device: documents are padded to the longest for SDPA only.

    q_TQD       float[T, Q, D];  k_TKD, v_TKD float[T, K, D] with K dividing Q
    cu_seqlens  i32[S+1], document boundaries in the packed row
    returns     float[T, Q, D]

    Padding stands after each document's tokens, so the causal rule keeps every real token from seeing it.
    """
    slots_T, documents = _slots(cu_seqlens, max_seqlen)

    def pad(x_TND: Tensor) -> Tensor:
        padded = x_TND.new_zeros(documents * max_seqlen, *x_TND.shape[1:]).index_copy(0, slots_T, x_TND)
        return padded.view(documents, max_seqlen, *x_TND.shape[1:]).transpose(1, 2)

    q, k, v = pad(q_TQD), pad(k_TKD), pad(v_TKD)
    out_SQLD = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out_SQLD.transpose(1, 2).reshape(documents * max_seqlen, *q_TQD.shape[1:]).index_select(0, slots_T)


def _slots(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, int]:
    """Where each packed token stands in the padded [S * L] layout."""
    lengths_S = cu_seqlens.diff().to(torch.int64)
    documents = len(lengths_S)
    starts_S = cu_seqlens[:-1].to(torch.int64)
    shift_S = torch.arange(documents, device=cu_seqlens.device) * max_seqlen - starts_S
    tokens = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    return tokens + shift_S.repeat_interleave(lengths_S, output_size=len(tokens)), documents


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
