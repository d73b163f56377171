"""Attention over packed rows, registered with transformers under one name per backend.

A packed row [1, T] holds several documents; each must attend only to itself. transformers can isolate documents by
position ids alone, but only while no cache is made and no attention mask is given, and otherwise leaks in silence. So
the layout travels with the call (`cu_seq_lens_q` and what belongs to it), and these functions never look at masks or
positions when it is there. Without it (generation) they are transformers' own SDPA attention.

A document's keys may begin with rows that it does not own: the prompt that a group of responses shares. Then `kv_rows`
lists, document by document, the packed rows of its keys, and queries are aligned with the end of their keys.
"""

# T packed tokens, U keys of all documents, S documents of a bucket, L longest of them, P places of all padded
# documents, Q query heads, G key-value heads, N either, D head dimension

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from or1.core.errors import AttentionError
from or1.dist.ulysses import to_all_heads, to_all_tokens
from or1.model.soft_attention import PLAIN, Scores, soft_attention, soft_bucket

# transformers takes any name with "flash" in it for its own flash attention.
NAMES = {"flash": "or1_packed_fa", "varlen": "or1_packed_varlen", "sdpa": "or1_packed"}

# Documents of one SDPA call differ in length by at most this factor, plus a constant that keeps short ones together.
_BUCKET_GROWTH, _BUCKET_SLACK = 1.25, 16

_packed: ContextVar[bool] = ContextVar("or1_packed_forward", default=False)


@dataclass(frozen=True)
class Layout:
    """Documents of a packed row.

    cu_q, cu_k    i32[S+1], boundaries of the documents in their queries and in their keys
    max_q, max_k  longest document in queries and in keys
    kv_rows_U     i64[U], packed rows of all keys; None: every document's keys are its own tokens
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    kv_rows_U: Tensor | None = None

    def as_kwargs(self) -> dict[str, object]:
        """The keyword arguments with which transformers models hand a layout down to their attention."""
        return {
            "cu_seq_lens_q": self.cu_q,
            "cu_seq_lens_k": self.cu_k,
            "max_length_q": self.max_q,
            "max_length_k": self.max_k,
            "kv_rows": self.kv_rows_U,
        }


@contextmanager
def packed_forward() -> Iterator[None]:
    """Inside, models with or1's attention build no mask: a [T, T] mask would outweigh the activations."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "flash", "varlen" or "sdpa" for `model.attention`. Raises AttentionError if an explicit choice cannot run."""
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
    """Causal attention within documents, float[T, Q, D].

    q_TQD   float[T, Q, D];  k_TGD, v_TGD float[T, G, D] with G dividing Q
    window  keys that a query sees, itself included; None: all before it
    scores  a soft cap, and sinks; where the backend lacks them, `soft_attention` computes them instead
    """
    if layout.kv_rows_U is not None:
        k_TGD, v_TGD = k_TGD.index_select(0, layout.kv_rows_U), v_TGD.index_select(0, layout.kv_rows_U)
    # No query reaches past its document's keys.
    window = None if window is not None and window >= layout.max_k else window
    scores = replace(scores, scale=scale, window=window)
    if scores.soft and not (backend == "flash" and scores.sinks_Q is None):
        backend = "sdpa"
    return _BACKENDS[backend](q_TQD, k_TGD, v_TGD, layout, scores)


def _flash(q_TQD: Tensor, k_UGD: Tensor, v_UGD: Tensor, layout: Layout, scores: Scores) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    # flash-attn counts the keys to the left of the query, without the query's own.
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
    # The causal and grouped-heads switches changed their form between torch 2.10 and 2.13.
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {"enable_gqa": True} if "enable_gqa" in known else {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise AttentionError(
            f"this torch's varlen attention has no sliding window ({window} tokens); "
            'set model.attention = "flash" or "sdpa"'
        )
    return varlen_attn(
        q_TQD, k_UGD, v_UGD, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, scale=scores.scale, **options
    )


def _sdpa(q_TQD: Tensor, k_UGD: Tensor, v_UGD: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """Documents of similar length, padded to the longest of them, in one SDPA call each.

    Borrowed keys bring their queries along, whose results are dropped: that costs what the documents would cost alone,
    while SDPA's general masks cost more and skip nothing.
    """
    cu_k = layout.cu_k.tolist()
    padding = _Padding.of([b - a for a, b in pairwise(cu_k)], q_TQD.device)
    q_UQD = q_TQD if layout.kv_rows_U is None else q_TQD.index_select(0, layout.kv_rows_U)
    q_P, k_P, v_P = (_Pad.apply(x, padding.rows_P, padding.places_U) for x in (q_UQD, k_UGD, v_UGD))
    sizes = [s * n for s, n in padding.shapes]
    parts = [
        _sdpa_bucket(*(x.unflatten(0, shape).transpose(1, 2) for x in qkv), scores)
        for shape, *qkv in zip(padding.shapes, q_P.split(sizes), k_P.split(sizes), v_P.split(sizes), strict=True)
    ]
    out_UQD = _Unpad.apply(torch.cat(parts), padding.places_U)
    if layout.kv_rows_U is None:
        return out_UQD
    own = [torch.arange(end - n, end) for n, end in zip(layout.cu_q.diff().tolist(), cu_k[1:], strict=True)]
    return out_UQD.index_select(0, torch.cat(own).to(q_TQD.device))


@dataclass(frozen=True)
class _Padding:
    """Where documents stand once those of similar length are padded to equal ones.

    shapes    documents and longest of each bucket
    rows_P    i64[P], the row of each padded place; the padding repeats its document's last row
    places_U  i64[U], the padded place of each row
    """

    shapes: list[tuple[int, int]]
    rows_P: Tensor
    places_U: Tensor

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> _Padding:
        """The padding of documents of these lengths that follow one another."""
        length_S = np.asarray(lengths, dtype=np.int64)
        start_S = length_S.cumsum() - length_S
        shapes, rows, places, end = [], [], np.empty(length_S.sum(), dtype=np.int64), 0
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
    """x[rows_P]. No query sees padding, so the gradient of its places is zero and need not be added up.

    Indexing by itself would add up every place's gradient, slicing document by document would make a zero tensor of
    the whole row for each: both take longer than attention.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_UND: Tensor, rows_P: Tensor, places_U: Tensor) -> Tensor:
        ctx.save_for_backward(places_U)
        return x_UND.index_select(0, rows_P)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_PND: Tensor) -> tuple[Tensor, None, None]:
        (places_U,) = ctx.saved_tensors
        return grad_PND.index_select(0, places_U), None, None


class _Unpad(torch.autograd.Function):
    """x[places_U], which are all different."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_PQD: Tensor, places_U: Tensor) -> Tensor:
        ctx.save_for_backward(places_U)
        ctx.padded = x_PQD.shape
        return x_PQD.index_select(0, places_U)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_UQD: Tensor) -> tuple[Tensor, None]:
        (places_U,) = ctx.saved_tensors
        return grad_UQD.new_zeros(ctx.padded).index_copy_(0, places_U, grad_UQD), None


def _buckets(lengths: list[int]) -> Iterator[list[int]]:
    """Documents that are cheap to pad together, shortest first."""
    bucket: list[int] = []
    for s in sorted(range(len(lengths)), key=lambda s: lengths[s]):
        if bucket and lengths[s] > _BUCKET_GROWTH * lengths[bucket[0]] + _BUCKET_SLACK:
            yield bucket
            bucket = []
        bucket.append(s)
    if bucket:
        yield bucket


def _sdpa_bucket(q_SQLD: Tensor, k_SGLD: Tensor, v_SGLD: Tensor, scores: Scores) -> Tensor:
    # Padding stands after each document's tokens, so the causal rule keeps every real token from seeing it.
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
    """bool[L, L], true where a query sees a key."""
    at_L = torch.arange(length, device=device)
    back_LL = at_L[:, None] - at_L
    return (back_LL >= 0) & (back_LL < window)


_BACKENDS: dict[str, Callable[..., Tensor]] = {"flash": _flash, "varlen": _varlen, "sdpa": _sdpa}


def _refuse(kwargs: dict[str, object]) -> None:
    """What models ask of their attention and packed rows do not have must not be left out in silence."""
    for name in ("dropout", "position_bias", "indices", "block_indices", "sinks"):
        value = kwargs.get(name)
        if value is not None and not (isinstance(value, float | int) and value == 0):
            raise AttentionError(
                f"the model's attention uses {name}, which or1's packed attention does not have; "
                "docs/models.md lists architectures that train"
            )


def _scores(kwargs: dict[str, object], scale: float | None, group: dist.ProcessGroup | None) -> Scores:
    softcap, sinks_Q = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    if sinks_Q is not None and group is not None:
        # This rank computes some of the heads.
        sinks_Q = sinks_Q.chunk(group.size())[group.rank()]
    return Scores(scale, softcap=softcap or None, sinks_Q=sinks_Q)


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
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        group = kwargs.get("sequence_group")
        scores = _scores(kwargs, scaling, group)
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
            kwargs["cu_seq_lens_q"],
            kwargs["cu_seq_lens_k"],
            kwargs["max_length_q"],
            kwargs["max_length_k"],
            kwargs.get("kv_rows"),
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
    """What `sdpa_attention_forward` does, with a soft cap and sinks; float[B, L, Q, D]."""
    length, keys = query.shape[2], key.shape[2]
    if mask is None and length > 1 and getattr(module, "is_causal", True):
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)
    return soft_attention(query, key, value, mask, scores).transpose(1, 2).contiguous()


def _mask(*args: object, **kwargs: object) -> Tensor | None:
    return None if _packed.get() else sdpa_mask(*args, **kwargs)


for _backend, _name in NAMES.items():
    AttentionInterface.register(_name, _interface(_backend))
    AttentionMaskInterface.register(_name, _mask)
