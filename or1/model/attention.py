"""Attention over packed rows. `register` makes one backend known to transformers.

A packed row [1, T] holds several documents, and each must attend only to itself. transformers can isolate documents by
position ids alone, but only without a cache and without an attention mask. Otherwise documents leak silently. Here the
layout is passed with the call instead (`cu_seq_lens_q` and related arguments), and masks and positions are ignored.
A call without a layout (generation) uses transformers' own SDPA attention.

The keys of a document may begin with rows of another document: the prompt that a group of responses shares. Then
`kv_rows` lists the packed rows of each document's keys. The last query of a document is aligned with its last key.
"""

# T packed tokens, U keys of all documents, S documents of a bucket, L longest of them, P positions of all padded
# documents, Q query heads, G key-value heads, N either, D head dimension

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from or1.core.errors import AttentionError
from or1.dist.ulysses import to_all_heads, to_all_tokens
from or1.model.rows import Microbatch
from or1.model.soft_attention import PLAIN, Scores, soft_attention, soft_bucket

# No name may contain "flash": transformers would use its own flash attention.
_NAMES = {"flash": "or1_packed_fa", "varlen": "or1_packed_varlen", "sdpa": "or1_packed"}

# Documents of one SDPA call differ in length by at most this factor plus this number of tokens.
_BUCKET_GROWTH, _BUCKET_SLACK = 1.25, 16

_packed: ContextVar[bool] = ContextVar("or1_packed_forward", default=False)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Boundaries of the documents of a packed row.

    cu_q, cu_k    i32[S+1], cumulative query and key counts of the documents, from 0
    max_q, max_k  largest query and key count of a document
    kv_rows_U     i64[U], packed rows of all keys; None: every document's keys are its own tokens
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    kv_rows_U: Tensor | None = None

    @classmethod
    def of(cls, row: Microbatch) -> Layout:
        """Return the layout of a packed row."""
        return cls(
            cu_q=row.cu_seqlens, cu_k=row.cu_keys, max_q=row.max_seqlen, max_k=row.max_keys, kv_rows_U=row.kv_rows_U
        )

    def as_kwargs(self) -> dict[str, object]:
        """Return keyword arguments for a transformers decoder, which passes them to its attention."""
        return {
            "cu_seq_lens_q": self.cu_q,
            "cu_seq_lens_k": self.cu_k,
            "max_length_q": self.max_q,
            "max_length_k": self.max_k,
            "kv_rows": self.kv_rows_U,
        }


@contextmanager
def packed_forward() -> Iterator[None]:
    """Disable attention masks in models with or1's attention: a [T, T] mask needs more memory than the activations."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return "flash", "varlen" or "sdpa" for the setting `model.attention`.

    "auto" is flash-attn where it is installed, else torch's varlen attention; on a CPU or in fp32 it is SDPA.
    Raises AttentionError if an explicit choice cannot run.
    """
    on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if wanted == "auto":
        return ("flash" if has_flash else "varlen") if on_gpu else "sdpa"
    if wanted != "sdpa" and not on_gpu:
        raise AttentionError(
            f'model.attention = "{wanted}" needs a GPU and 16-bit weights, but the model is {dtype} on {device}; '
            'use "auto" or "sdpa"'
        )
    if wanted == "flash" and not has_flash:
        raise AttentionError(
            'model.attention = "flash", but flash-attn is not installed; pip install "or1[flash-attn]", or use "varlen"'
        )
    return wanted


def packed_attention(
    q_TQD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    layout: Layout,
    scale: float | None = None,
    *,
    window: int | None = None,
    backend: str = "sdpa",
    scores: Scores = PLAIN,
) -> Tensor:
    """Return causal attention within documents, float[T, Q, D].

    q_TQD   float[T, Q, D];  k_TGD, v_TGD float[T, G, D] with G dividing Q
    window  number of keys that a query attends to, itself included; None: all keys up to the query
    scores  soft cap and sinks; `soft_attention` computes them if the backend cannot
    """
    if layout.kv_rows_U is not None:
        k_TGD, v_TGD = k_TGD.index_select(0, layout.kv_rows_U), v_TGD.index_select(0, layout.kv_rows_U)
    # A window at least as long as the longest document has no effect.
    window = None if window is not None and window >= layout.max_k else window
    scores = replace(scores, scale=scale, window=window)
    if scores.soft and not (backend == "flash" and scores.sinks_Q is None):
        backend = "sdpa"
    return _BACKENDS[backend](q_TQD, k_TGD, v_TGD, layout, scores)


def _flash(q_TQD: Tensor, k_UGD: Tensor, v_UGD: Tensor, layout: Layout, scores: Scores) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    # flash-attn counts only the keys to the left of the query.
    return flash_attn_varlen_func(
        q_TQD,
        k_UGD,
        v_UGD,
        layout.cu_q,
        layout.cu_k,
        layout.max_q,
        layout.max_k,
        causal=True,
        softmax_scale=scores.scale,
        window_size=(-1 if scores.window is None else scores.window - 1, 0),
        softcap=scores.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _varlen(q_TQD: Tensor, k_UGD: Tensor, v_UGD: Tensor, layout: Layout, scores: Scores) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    window = scores.window
    # The arguments for causal attention and grouped heads changed between torch 2.10 and 2.13.
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise AttentionError(
            f"this torch's varlen attention has no sliding window ({window} tokens); "
            'set model.attention = "flash" or "sdpa"'
        )
    # The result is a tuple only with `return_aux`.
    out_TQD: Any = varlen_attn(
        q_TQD, k_UGD, v_UGD, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, scale=scores.scale, **options
    )
    return out_TQD


def _sdpa(q_TQD: Tensor, k_UGD: Tensor, v_UGD: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """Compute attention with one SDPA call per bucket of documents of similar length, padded to the longest.

    For shared keys the queries of the shared rows are computed too, and their outputs are dropped. That costs as much
    as the unshared documents. A general mask in SDPA would cost more, since SDPA skips no masked block.
    """
    cu_k = layout.cu_k.tolist()
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
    own = [torch.arange(end - n, end) for n, end in zip(layout.cu_q.diff().tolist(), cu_k[1:], strict=True)]
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


_BACKENDS: dict[str, Callable[..., Tensor]] = {"flash": _flash, "varlen": _varlen, "sdpa": _sdpa}


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raise AttentionError if a model asks for something that packed attention would otherwise ignore."""
    for name in ("dropout", "position_bias", "indices", "block_indices", "sinks"):
        value = kwargs.get(name)
        if value is not None and not (isinstance(value, float | int) and value == 0):
            raise AttentionError(
                f"the model's attention uses {name}, which or1's packed attention does not support; "
                "docs/models.md lists architectures that train"
            )


def _own_sinks(sinks_Q: Tensor | None, group: dist.ProcessGroup | None) -> Tensor | None:
    """Return the sinks of the heads that this rank computes."""
    return sinks_Q if sinks_Q is None or group is None else sinks_Q.chunk(group.size())[group.rank()]


def _interface(backend: str) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sequence_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        group = sequence_group
        scores = Scores(scaling, softcap=softcap or None, sinks_Q=_own_sinks(s_aux, group))
        if kwargs.get("cu_seq_lens_q") is None:
            if _packed.get():
                raise AttentionError(
                    "the model's layers do not hand the layout of a packed row on to their attention; "
                    "docs/models.md lists architectures that train"
                )
            if scores.soft:
                return _generating(module, query, key, value, attention_mask, scores), None
            if sliding_window is not None:
                kwargs["sliding_window"] = sliding_window
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        _refuse(kwargs)
        layout = Layout(
            cu_q=kwargs["cu_seq_lens_q"],
            cu_k=kwargs["cu_seq_lens_k"],
            max_q=kwargs["max_length_q"],
            max_k=kwargs["max_length_k"],
            kv_rows_U=kwargs.get("kv_rows"),
        )
        q_TQD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (query, key, value))
        if group is not None:
            q_TQD, k_TGD, v_TGD = (to_all_tokens(x.contiguous(), group) for x in (q_TQD, k_TGD, v_TGD))
        out_TQD = packed_attention(
            q_TQD, k_TGD, v_TGD, layout, scaling, window=sliding_window, backend=backend, scores=scores
        )
        return (out_TQD if group is None else to_all_heads(out_TQD, group))[None], None

    return attention


def _generating(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores
) -> Tensor:
    """Return attention with a soft cap or sinks for generation, float[B, L, Q, D], as `sdpa_attention_forward`."""
    length, keys = query.shape[2], key.shape[2]
    if mask is None and length > 1 and getattr(module, "is_causal", True):
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)
    return soft_attention(query, key, value, mask, scores).transpose(1, 2).contiguous()


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _packed.get() else sdpa_mask(*args, **kwargs)


def register(backend: str = "sdpa") -> str:
    """Register or1's attention with transformers and return its name, for `attn_implementation`. Idempotent.

    backend  "flash", "varlen" or "sdpa", from `choose_backend`
    """
    name = _NAMES[backend]
    AttentionInterface.register(name, _interface(backend))
    AttentionMaskInterface.register(name, _mask)
    return name
