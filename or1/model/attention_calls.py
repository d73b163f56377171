"""The calls of the attention kernels, one function a backend.

All take the same arguments and return float[T, Q, D]. Traps that differ from library to library:

  windows        -1 means "no limit" to flash-attn 2, flash-attn 3 and torch; flash-attn 4 takes None for that, and
                 takes -1 with a right side of 0 for a window
  results        flash-attn 4 and early releases of flash-attn 3 return a tuple of output and log-sum-exp
  grouped heads  torch 2.13 wants `enable_gqa`, which torch 2.11 does not know
  determinism    an argument of flash-attn; torch's own follow `use_deterministic_algorithms`
"""

# T packed tokens, U keys of all documents, L tokens of a document, Q query heads, G key-value heads, N either, D head
# dimension

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from or1.core.errors import AttentionError
from or1.model.attention_backends import function_of
from or1.model.attention_layout import Layout
from or1.model.boundaries import on_host
from or1.model.flash4_operator import backward_function, flash_attention_4, sides
from or1.model.sdpa_attention import sdpa
from or1.model.soft_attention import Scores

# Shorter documents are not worth a call of their own (a prediction; flash-attn 2 takes all of them in one call).
_LONG = 2048


def flash2(q_TQD: Tensor, k_UGD: Tensor, v_UGD: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """Call flash-attn 2."""
    return _output(
        function_of("flash")(
            q_TQD,
            k_UGD,
            v_UGD,
            **_boundaries(q_TQD, layout),
            softmax_scale=scores.scale,
            causal=True,
            window_size=_window(scores),
            softcap=scores.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    )


def flash3(q_TQD: Tensor, k_UGD: Tensor, v_UGD: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """Call flash-attn 3."""
    return _output(
        function_of("flash3")(
            q_TQD,
            k_UGD,
            v_UGD,
            **_boundaries(q_TQD, layout),
            softmax_scale=scores.scale,
            causal=True,
            window_size=_window(scores),
            softcap=scores.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    )


def flash4(q_TQD: Tensor, k_UGD: Tensor, v_UGD: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """Call flash-attn 4, as an operator whose output a checkpointed layer can keep if this release allows that."""
    bounds = _boundaries(q_TQD, layout)
    softcap, deterministic = scores.softcap or 0.0, torch.are_deterministic_algorithms_enabled()
    if backward_function() is not None:
        out_TQD: Tensor = flash_attention_4(
            q_TQD,
            k_UGD,
            v_UGD,
            scores.sinks_Q,
            bounds["cu_seqlens_q"],
            bounds["cu_seqlens_k"],
            max_q=bounds["max_seqlen_q"],
            max_k=bounds["max_seqlen_k"],
            scale=scores.scale,
            window=scores.window,
            softcap=softcap,
            deterministic=deterministic,
        )[0]
        return out_TQD
    return _output(
        function_of("flash4")(
            q_TQD,
            k_UGD,
            v_UGD,
            **bounds,
            softmax_scale=scores.scale,
            causal=True,
            window_size=sides(scores.window),
            learnable_sink=scores.sinks_Q,
            softcap=softcap,
            deterministic=deterministic,
        )
    )


def varlen(q_TQD: Tensor, k_UGD: Tensor, v_UGD: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """Call torch's varlen attention, which is flash-attn 2 inside torch."""
    call = function_of("varlen")
    bounds = _boundaries(q_TQD, layout)
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(call).parameters else {}
    return _output(
        call(
            q_TQD,
            k_UGD,
            v_UGD,
            bounds["cu_seqlens_q"],
            bounds["cu_seqlens_k"],
            bounds["max_seqlen_q"],
            bounds["max_seqlen_k"],
            scale=scores.scale,
            window_size=_window(scores),
            **grouped,
        )
    )


def cudnn(q_TQD: Tensor, k_UGD: Tensor, v_UGD: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """Compute long documents one by one with cuDNN, and the others with torch's varlen attention.

    SDPA aligns the first query with the first key. Documents with borrowed keys need the last ones aligned, so varlen
    attention computes them, and layers with a window.
    """
    pieces = _pieces(layout)
    if scores.window is not None or not any(piece.long for piece in pieces):
        return varlen(q_TQD, k_UGD, v_UGD, layout, scores)
    q_parts = q_TQD.split([piece.queries for piece in pieces])
    k_parts, v_parts = (x.split([piece.keys for piece in pieces]) for x in (k_UGD, v_UGD))
    out = []
    for piece, q, k, v in zip(pieces, q_parts, k_parts, v_parts, strict=True):
        out.append(_document(q, k, v, scores) if piece.long else varlen(q, k, v, piece.of(layout), scores))
    return torch.cat(out)


def _document(q_LQD: Tensor, k_LGD: Tensor, v_LGD: Tensor, scores: Scores) -> Tensor:
    """Return causal attention of one document with cuDNN."""
    length = len(q_LQD)
    # cuDNN compiles a plan for each length, so lengths are rounded up to at most 8 in each doubling. The padding
    # follows the document, and the causal mask hides it.
    extra = (0, 0, 0, 0, 0, _rounded(length) - length)
    q, k, v = (pad(x, extra).transpose(0, 1)[None] for x in (q_LQD, k_LGD, v_LGD))
    # In order: what cuDNN cannot do on this GPU is left to flash-attn 2 inside torch, never to a [L, L] matrix.
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scores.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out[0].transpose(0, 1)[:length]


def _rounded(length: int) -> int:
    step = max(1, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


@dataclass(frozen=True)
class _Piece:
    """Consecutive documents of a row that are computed together: one long document, or several others."""

    first: int
    end: int
    queries: int
    keys: int
    max_q: int
    max_k: int
    long: bool

    def of(self, layout: Layout) -> Layout:
        """Return the layout of these documents alone."""
        here = slice(self.first, self.end + 1)
        cu_q, cu_k = (cu[here] - cu[self.first] for cu in (layout.cu_q, layout.cu_k))
        return replace(layout, cu_q=cu_q, cu_k=cu_k, max_q=self.max_q, max_k=self.max_k)


def _pieces(layout: Layout) -> list[_Piece]:
    lengths = [[b - a for a, b in pairwise(on_host(cu))] for cu in (layout.cu_q, layout.cu_k)]
    pieces: list[_Piece] = []
    for at, (q, k) in enumerate(zip(*lengths, strict=True)):
        new = _Piece(at, at + 1, q, k, q, k, long=q == k and q >= _LONG)
        last = pieces[-1] if pieces else new
        if pieces and not last.long and not new.long:
            pieces[-1] = _Piece(
                last.first, new.end, last.queries + q, last.keys + k, max(last.max_q, q), max(last.max_k, k), long=False
            )
        else:
            pieces.append(new)
    return pieces


def _boundaries(q_TQD: Tensor, layout: Layout) -> dict[str, Any]:
    """Return the boundaries under the names of flash-attn.

    Kernels read boundaries of another type as if they were int32, so these are errors here.
    """
    for name, bounds in (("cu_q", layout.cu_q), ("cu_k", layout.cu_k)):
        if bounds.dtype != torch.int32 or bounds.device != q_TQD.device or not bounds.is_contiguous():
            raise AttentionError(
                f"boundaries {name} of a packed row are {bounds.dtype} on {bounds.device}, but attention kernels need "
                f"contiguous torch.int32 on {q_TQD.device}; take them from or1.model.rows"
            )
    return {
        "cu_seqlens_q": layout.cu_q,
        "cu_seqlens_k": layout.cu_k,
        # Not numbers of numpy or tensors, which compiled kernels would take for something else.
        "max_seqlen_q": int(layout.max_q),
        "max_seqlen_k": int(layout.max_k),
    }


def _window(scores: Scores) -> tuple[int, int]:
    """Return the keys to the left and right of a query's own; -1: no limit."""
    return (-1 if scores.window is None else scores.window - 1, 0)


def _output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, Layout, Scores], Tensor]] = {
    "flash3": flash3,
    "flash4": flash4,
    "cudnn": cudnn,
    "flash": flash2,
    "varlen": varlen,
    "sdpa": sdpa,
}
