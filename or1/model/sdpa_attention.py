"""Attention over packed rows with torch's scaled_dot_product_attention: any device, any dtype, any model."""

# U keys of all documents, S documents of a bucket, L longest of them, P positions of all padded documents, Q query
# heads, G key-value heads, N either, D head dimension

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from or1.model.attention_layout import Layout
from or1.model.boundaries import on_host
from or1.model.soft_attention import Scores, soft_bucket

# Documents of one SDPA call differ in length by at most this factor plus this number of tokens.
_BUCKET_GROWTH, _BUCKET_SLACK = 1.25, 16


def sdpa(q_TQD: Tensor, k_UGD: Tensor, v_UGD: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """Compute attention with one SDPA call per bucket of documents of similar length, padded to the longest.

    For shared keys the queries of the shared rows are computed too, and their outputs are dropped. That costs as much
    as the unshared documents. A general mask in SDPA would cost more, since SDPA skips no masked block.
    """
    cu_k = on_host(layout.cu_k)
    padding = _Padding.of([b - a for a, b in pairwise(cu_k)], q_TQD.device)
    q_UQD = q_TQD if layout.kv_rows_U is None else q_TQD.index_select(0, layout.kv_rows_U)
    q_P, k_P, v_P = (_Pad.apply(x, padding.rows_P, padding.places_U) for x in (q_UQD, k_UGD, v_UGD))
    sizes = [s * n for s, n in padding.shapes]
    parts = []
    for shape, q, k, v in zip(padding.shapes, q_P.split(sizes), k_P.split(sizes), v_P.split(sizes), strict=True):
        q_SQLD, k_SGLD, v_SGLD = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
        parts.append(_sdpa_bucket(q_SQLD, k_SGLD, v_SGLD, scores))
    out_UQD = _Unpad.apply(torch.cat(parts), padding.places_U)
    if layout.kv_rows_U is None:
        return out_UQD
    q_lens = [b - a for a, b in pairwise(on_host(layout.cu_q))]
    own = [torch.arange(end - n, end) for n, end in zip(q_lens, cu_k[1:], strict=True)]
    return out_UQD.index_select(0, torch.cat(own).to(q_TQD.device))


@dataclass(frozen=True)
class _Padding:
    """Positions of documents after padding each bucket to its longest document.

    shapes    (documents, padded length) of each bucket
    rows_P    i64[P], source row of each padded position; padding repeats the last row of its document
    places_U  i64[U], padded position of each row
    """

    shapes: list[tuple[int, int]]
    rows_P: Tensor
    places_U: Tensor

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> _Padding:
        """Return the padding for consecutive documents of these lengths."""
        length_S = np.asarray(lengths, dtype=np.int64)
        start_S = length_S.cumsum() - length_S
        shapes: list[tuple[int, int]] = []
        rows, places, end = [], np.empty(length_S.sum(), dtype=np.int64), 0
        for bucket in _buckets(lengths):
            n_S, at_L = length_S[bucket, None], np.arange(length_S[bucket].max())
            rows_SL = start_S[bucket, None] + np.minimum(at_L, n_S - 1)
            real_SL = at_L < n_S
            places[rows_SL[real_SL]] = end + np.flatnonzero(real_SL)
            shapes.append(rows_SL.shape)
            rows.append(rows_SL.ravel())
            end += rows_SL.size
        return cls(shapes, torch.from_numpy(np.concatenate(rows)).to(device), torch.from_numpy(places).to(device))


class _Pad(torch.autograd.Function):
    """Gather x[rows_P]. No query attends to padding, so backward skips the gradient of padded positions.

    The backward of plain indexing would add up the gradient of every padded position. Slicing each document would make
    a zero tensor of the whole row per document. Both take longer than the attention itself.
    """

    @staticmethod
    def forward(ctx: Any, x_UND: Tensor, rows_P: Tensor, places_U: Tensor) -> Tensor:
        ctx.save_for_backward(places_U)
        return x_UND.index_select(0, rows_P)

    @staticmethod
    def backward(ctx: Any, grad_PND: Tensor) -> tuple[Tensor, None, None]:
        (places_U,) = ctx.saved_tensors
        return grad_PND.index_select(0, places_U), None, None


class _Unpad(torch.autograd.Function):
    """Gather x[places_U]; all indices are distinct, so backward is a copy."""

    @staticmethod
    def forward(ctx: Any, x_PQD: Tensor, places_U: Tensor) -> Tensor:
        ctx.save_for_backward(places_U)
        ctx.padded = x_PQD.shape
        return x_PQD.index_select(0, places_U)

    @staticmethod
    def backward(ctx: Any, grad_UQD: Tensor) -> tuple[Tensor, None]:
        (places_U,) = ctx.saved_tensors
        return grad_UQD.new_zeros(ctx.padded).index_copy_(0, places_U, grad_UQD), None


def _buckets(lengths: list[int]) -> Iterator[list[int]]:
    """Yield the indices of documents that are cheap to pad together, shortest first."""
    bucket: list[int] = []
    for s in sorted(range(len(lengths)), key=lambda s: lengths[s]):
        if bucket and lengths[s] > _BUCKET_GROWTH * lengths[bucket[0]] + _BUCKET_SLACK:
            yield bucket
            bucket = []
        bucket.append(s)
    if bucket:
        yield bucket


def _sdpa_bucket(q_SQLD: Tensor, k_SGLD: Tensor, v_SGLD: Tensor, scores: Scores) -> Tensor:
    # Padding follows each document's tokens, so the causal mask hides the padding from every real token.
    if scores.soft:
        return soft_bucket(q_SQLD, k_SGLD, v_SGLD, scores)
    mask = None if scores.window is None else _window_mask(q_SQLD.shape[2], scores.window, q_SQLD.device)
    out_SQLD = scaled_dot_product_attention(
        q_SQLD,
        k_SGLD,
        v_SGLD,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scores.scale,
        enable_gqa=q_SQLD.shape[1] != k_SGLD.shape[1],
    )
    return out_SQLD.transpose(1, 2).flatten(0, 1)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Return bool[L, L], true where a query attends to a key."""
    at_L = torch.arange(length, device=device)
    back_LL = at_L[:, None] - at_L
    return (back_LL >= 0) & (back_LL < window)
