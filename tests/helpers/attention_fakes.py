"""Fakes of the attention libraries, which need a GPU: the real signatures and conventions, computed in fp64.

Sources of the signatures:

  flash        flash-attn 2.8.4, flash_attn/flash_attn_interface.py, flash_attn_varlen_func
  flash3       flash-attn 3.0.0, hopper/flash_attn_interface.py at commit 0251105a, flash_attn_varlen_func
  flash4       flash-attn-4 4.0.0b36, flash_attn/cute/interface.py of the wheel, flash_attn_varlen_func, _flash_attn_bwd
  varlen_2_11  torch/nn/attention/varlen.py of the wheel, varlen_attn
  varlen_2_13  the same file as installed; a test compares the two

An unknown keyword is a TypeError, as in the libraries. What a library ignores or forbids in packed training is an
assertion.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from or1.model import attention_backends, flash4_operator


@dataclass
class Calls:
    """The arguments of each call of a fake."""

    made: list[dict[str, Any]] = field(default_factory=list)

    def note(self, arguments: dict[str, Any]) -> None:
        self.made.append({name: value for name, value in arguments.items() if not isinstance(value, Tensor)})


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    left: int | None,
    right: int | None,
    scale: float | None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> Tensor:
    """Return attention per document with the last query at the last key; rows outside of documents are NaN.

    left, right  keys that a query sees beside its own position; None: all
    """
    dtype, repeat = q.dtype, q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k, v))
    parts = []
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        keys, values = (x[c:d].repeat_interleave(repeat, dim=1) for x in (k, v))
        scores = torch.einsum("iqd,jqd->qij", q[a:b], keys) * (q.shape[2] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        back = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        seen = torch.ones_like(back, dtype=torch.bool)
        if left is not None:
            seen &= back <= left
        if right is not None:
            seen &= back >= -right
        scores = scores.masked_fill(~seen, -torch.inf)
        if sink is not None:
            scores = torch.cat([scores, sink.double()[:, None, None].expand(-1, b - a, 1)], dim=-1)
        parts.append(torch.einsum("qij,jqd->iqd", scores.softmax(-1)[..., : d - c], values))
    outside = q.new_full((len(q) - int(cu_q[-1]), *q.shape[1:]), torch.nan)
    return torch.cat([*parts, outside]).to(dtype)


def check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: Any, max_k: Any) -> None:
    """Assert what the kernels check or silently rely on."""
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.dtype == k.dtype == v.dtype
    assert q.dim() == k.dim() == v.dim() == 3
    assert k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    for cu, x, most in ((cu_q, q, max_q), (cu_k, k, max_k)):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        assert cu.device == x.device
        assert cu[0] == 0
        assert cu[-1] == len(x), "rows outside of documents are never written"
        assert type(most) is int
        assert most == int(cu.diff().max())
    assert len(cu_q) == len(cu_k)


def fake_flash2(calls: Calls) -> Callable[..., Any]:
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        calls.note(locals())
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert dropout_p == 0.0
        assert alibi_slopes is None
        assert block_table is None
        assert not return_attn_probs
        left, right = (None if side < 0 else side for side in window_size)
        return attend(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            left=left,
            right=0 if causal else right,
            scale=softmax_scale,
            softcap=softcap,
        )

    return flash_attn_varlen_func


def fake_flash3(calls: Calls, *, with_lse: bool = False) -> Callable[..., Any]:
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        calls.note(locals())
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert q.shape[2] % 8 == 0
        assert all(x is None for x in (seqused_q, seqused_k, qv, q_descale, k_descale, v_descale))
        assert attention_chunk == 0, "its backward refuses chunks"
        left, right = (None if side < 0 else side for side in window_size)
        out = attend(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            left=left,
            right=0 if causal else right,
            scale=softmax_scale,
            softcap=softcap,
        )
        # Releases before 3.0.0 returned the log-sum-exp too.
        return (out, out.new_zeros(q.shape[1], len(q))) if with_lse or return_attn_probs else out

    return flash_attn_varlen_func


def fake_flash4(calls: Calls) -> Callable[..., Any]:
    def flash_attn_varlen_func(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        gather_kv_indices=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        block_sparse_tensors=None,
        aux_tensors=None,
        aux_scalars=None,
        return_lse=False,
        scheduler_metadata=None,
        seqlen_k_per_split=None,
        disable_scheduler_metadata=False,
        gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):
        calls.note(locals())
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert q.shape[2] % 8 == 0
        for other in (qv, seqused_q, seqused_k, gather_kv_indices, page_table, score_mod, mask_mod, aux_tensors):
            assert other is None
        assert learnable_sink is None or learnable_sink.shape == (q.shape[1],)
        left, right = window_size
        if left is not None and right is not None and left < 0 and right < 0:
            left = right = None
        # A left side of -1 beside a right side is a window here, one that leaves out the query's own key.
        out = attend(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            left=left,
            right=0 if causal else right,
            scale=softmax_scale,
            softcap=softcap or 0.0,
            sink=learnable_sink,
        )
        return out, _lse(q) if return_lse else None

    return flash_attn_varlen_func


def _lse(q: Tensor) -> Tensor:
    """Return values that stand for the log-sum-exp: the backward must get those of its own forward."""
    return q.detach().float().sum(-1).T.contiguous()


def fake_flash4_backward(calls: Calls) -> Callable[..., Any]:
    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        m_block_size=64,
        n_block_size=128,
        num_threads=256,
        pack_gqa=False,
        num_stages_Q=2,
        num_stages_dO=2,
        SdP_swapAB=False,
        dKV_swapAB=False,
        dQ_swapAB=False,
        AtomLayoutMSdP=2,
        AtomLayoutNdKV=2,
        AtomLayoutMdQ=2,
        V_in_regs=False,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        deterministic=False,
        dq=None,
        dk=None,
        dv=None,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        aux_tensors=None,
        aux_scalars=None,
        block_sparse_tensors=None,
        dlse=None,
        learnable_sink=None,
    ):
        calls.note(locals())
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert dout.dtype == out.dtype == q.dtype
        assert torch.equal(lse, _lse(q))
        leaves = [x.detach().requires_grad_() for x in (q, k, v, learnable_sink) if x is not None]
        with torch.enable_grad():
            again = attend(
                *leaves[:3],
                cu_seqlens_q,
                cu_seqlens_k,
                left=window_size_left,
                right=0 if causal else window_size_right,
                scale=softmax_scale,
                softcap=softcap,
                sink=None if learnable_sink is None else leaves[3],
            )
        assert torch.equal(again, out)
        # Without a sink three gradients, with one four.
        return torch.autograd.grad(again, leaves, dout)

    return _flash_attn_bwd


def _torch_varlen(calls: Calls, arguments: dict[str, Any]) -> Tensor:
    calls.note(arguments)
    q, k, v = (arguments[name] for name in ("query", "key", "value"))
    cu_q, cu_k = arguments["cu_seq_q"], arguments["cu_seq_k"]
    check(q, k, v, cu_q, cu_k, arguments["max_q"], arguments["max_k"])
    assert q.shape[2] % 8 == 0
    assert arguments["return_aux"] is None
    left, right = (None if side < 0 else side for side in arguments["window_size"])
    return attend(q, k, v, cu_q, cu_k, left=left, right=right, scale=arguments["scale"])


def fake_varlen_2_11(calls: Calls) -> Callable[..., Any]:
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        return _torch_varlen(calls, {name: value for name, value in locals().items() if name != "calls"})

    return varlen_attn


def fake_varlen_2_13(calls: Calls) -> Callable[..., Any]:
    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise ValueError("Expect query and key/value to have the same number of heads")
        assert seqused_k is None
        assert block_table is None
        return _torch_varlen(calls, {name: value for name, value in locals().items() if name != "calls"})

    return varlen_attn


FAKES: dict[str, tuple[str, Callable[[Calls], Callable[..., Any]]]] = {
    "flash": ("flash_attn", fake_flash2),
    "flash3": ("flash_attn_interface", fake_flash3),
    "flash3 with log-sum-exp": ("flash_attn_interface", lambda calls: fake_flash3(calls, with_lse=True)),
    "flash4": ("flash_attn.cute", fake_flash4),
    "flash4 without its backward": ("flash_attn.cute", fake_flash4),
    "varlen": ("torch.nn.attention.varlen", fake_varlen_2_13),
    "varlen of torch 2.11": ("torch.nn.attention.varlen", fake_varlen_2_11),
}


def forget() -> None:
    """Forget which imports worked and which backends serve which calls."""
    attention_backends._imported.cache_clear()
    attention_backends._serving.cache_clear()
    attention_backends._capability.cache_clear()
    flash4_operator.backward_function.cache_clear()


def install(name: str, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put the fake of a library where its function is imported; return the calls that will be made."""
    module, make = FAKES[name]
    calls = Calls()
    function = make(calls)
    if module.startswith("torch."):
        monkeypatch.setattr(f"{module}.varlen_attn", function)
    else:
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            made: Any = sys.modules.get(path) or types.ModuleType(path)
            made.__path__ = []
            monkeypatch.setitem(sys.modules, path, made)
        made.flash_attn_varlen_func = function
        if name == "flash4":
            inner: Any = types.ModuleType(f"{module}.interface")
            inner._flash_attn_bwd = fake_flash4_backward(Calls())
            monkeypatch.setitem(sys.modules, inner.__name__, inner)
    return calls
