"""flash-attn 4 as an operator of torch, so that checkpointed layers can keep its output.

Selective checkpointing keeps outputs of operators. flash-attn 2 and 3 register theirs. flash-attn 4 launches kernels
from an autograd function that torch's dispatcher does not see, so its forward would run again in backward.

The forward is the library's public function. The backward is `_flash_attn_bwd` of flash_attn.cute.interface, which
torch.nn.attention calls too. A release without these arguments is called through its own autograd function.
"""

# T packed tokens, U keys of all documents, Q query heads, G key-value heads, D head dimension

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from or1.model.attention_backends import function_of

_BACKWARD = {"softmax_scale", "causal", "softcap", "window_size_left", "window_size_right", "learnable_sink"}
_BACKWARD |= {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "deterministic"}


@cache
def backward_function() -> Callable[..., Any] | None:
    """Return the backward of flash-attn 4; None if this release has no such function or not its arguments."""
    if "return_lse" not in inspect.signature(function_of("flash4")).parameters:
        return None
    try:
        function: Callable[..., Any] | None = importlib.import_module("flash_attn.cute.interface")._flash_attn_bwd
    except (ImportError, AttributeError):
        return None
    assert function is not None
    return function if _BACKWARD.issubset(inspect.signature(function).parameters) else None


@torch.library.custom_op("or1::flash_attention_4", mutates_args=())
def flash_attention_4(
    q_TQD: Tensor,
    k_UGD: Tensor,
    v_UGD: Tensor,
    sinks_Q: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float | None,
    window: int | None,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Return causal attention within documents, float[T, Q, D], and the log-sum-exp of the scores, float32[Q, T]."""
    out_TQD, lse_QT = function_of("flash4")(
        q_TQD,
        k_UGD,
        v_UGD,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        softmax_scale=scale,
        causal=True,
        window_size=sides(window),
        learnable_sink=sinks_Q,
        softcap=softcap,
        deterministic=deterministic,
        return_lse=True,
    )
    return out_TQD, lse_QT


def sides(window: int | None) -> tuple[int | None, int | None]:
    """Return a window as flash-attn 4 reads it: None is no limit, and (-1, 0) would be taken for a window."""
    return (None, None) if window is None else (window - 1, 0)


@flash_attention_4.register_fake
def _(q_TQD: Tensor, k_UGD: Tensor, v_UGD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    tokens, heads = q_TQD.shape[:2]
    return q_TQD.new_empty(tokens, heads, v_UGD.shape[2]), q_TQD.new_empty(heads, tokens, dtype=torch.float32)


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_TQD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q_TQD, k_UGD, v_UGD, sinks_Q, cu_q, cu_k, out_TQD, lse_QT = ctx.saved_tensors
    options = ctx.options
    left, right = sides(options["window"])
    call = backward_function()
    assert call is not None
    dq_TQD, dk_UGD, dv_UGD, *dsinks = call(
        q_TQD,
        k_UGD,
        v_UGD,
        out_TQD,
        grad_TQD,
        lse_QT,
        softmax_scale=options["scale"],
        causal=True,
        softcap=options["softcap"],
        window_size_left=left,
        window_size_right=right,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=options["max_q"],
        max_seqlen_k=options["max_k"],
        deterministic=options["deterministic"],
        learnable_sink=sinks_Q,
    )
    return dq_TQD, dk_UGD, dv_UGD, dsinks[0] if dsinks else None, None, None


flash_attention_4.register_autograd(_backward, setup_context=_save)
