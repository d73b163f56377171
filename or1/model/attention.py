"""Attention over packed rows. `register` makes one backend known to transformers.

A packed row [1, T] holds several documents, and each must attend only to itself. transformers can isolate documents by
position ids alone, but only without a cache and without an attention mask. Otherwise documents leak silently. Here the
layout is passed with the call instead (`cu_seq_lens_q` and related arguments), and masks and positions are ignored.
A call without a layout (generation) uses transformers' own SDPA attention.

The keys of a document may begin with rows of another document: the prompt that a group of responses shares. Then
`kv_rows` lists the packed rows of each document's keys. The last query of a document is aligned with its last key.
"""

# T packed tokens, U keys of all documents, Q query heads, G key-value heads, D head dimension

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from or1.core.errors import AttentionError
from or1.dist.ulysses import to_all_heads, to_all_tokens
from or1.model.attention_backends import Features, choose_backend, serving
from or1.model.attention_calls import CALLS
from or1.model.attention_layout import Layout
from or1.model.soft_attention import PLAIN, Scores, soft_attention

__all__ = ["Layout", "choose_backend", "packed_attention", "packed_forward", "register"]

# No name may contain "flash": transformers would use its own flash attention.
_NAMES = {
    "flash3": "or1_packed_fa3",
    "flash4": "or1_packed_fa4",
    "cudnn": "or1_packed_cudnn",
    "flash": "or1_packed_fa",
    "varlen": "or1_packed_varlen",
    "sdpa": "or1_packed",
}

_packed: ContextVar[bool] = ContextVar("or1_packed_forward", default=False)


@contextmanager
def packed_forward() -> Iterator[None]:
    """Disable attention masks in models with or1's attention: a [T, T] mask needs more memory than the activations."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


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
    scores  soft cap and sinks
    backend a key of or1.model.attention_backends.BACKENDS; another one computes a call that its kernel cannot
    """
    if layout.kv_rows_U is not None:
        k_TGD, v_TGD = k_TGD.index_select(0, layout.kv_rows_U), v_TGD.index_select(0, layout.kv_rows_U)
    # A window at least as long as the longest document has no effect.
    window = None if window is not None and window >= layout.max_k else window
    scores = replace(scores, scale=scale, window=window)
    features = Features(
        head_dim=q_TQD.shape[2],
        value_dim=v_TGD.shape[2],
        softcap=scores.softcap is not None,
        sinks=scores.sinks_Q is not None,
    )
    backend = serving(backend, q_TQD.device, q_TQD.dtype, features)
    return CALLS[backend](q_TQD, k_TGD, v_TGD, layout, scores)


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
        layout = Layout.from_kwargs(kwargs)
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

    backend  a key of or1.model.attention_backends.BACKENDS, from `choose_backend`
    """
    name = _NAMES[backend]
    AttentionInterface.register(name, _interface(backend))
    AttentionMaskInterface.register(name, _mask)
    return name
