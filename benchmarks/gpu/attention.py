"""GPU part: packed attention by every library that is installed, one document of 32K and four of 8K, GQA 28 to 4.

Each candidate is compared with fp64 on a short row before it is timed. Legend: T packed tokens, Q query heads, G
key-value heads, D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.context import Context
from benchmarks.gpu.needs import first_line
from benchmarks.lib import measure

# From q [T, Q, D], k, v [T, G, D] and the documents' lengths: the output [T, Q, D].
Attention = Callable[[Tensor, Tensor, Tensor, "Documents"], Tensor]
_TIME_IS_UP = "the part's time is up"


@dataclass(frozen=True)
class Documents:
    """Lengths of the documents of a row, and their cumulative sums on the device, i32[S+1]."""

    lengths: tuple[int, ...]
    cu: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Documents:
        """Return the documents of these lengths."""
        return cls(lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device))

    @property
    def longest(self) -> int:
        """Largest length."""
        return max(self.lengths)

    def flops(self, heads: int, width: int) -> float:
        """Return the operations of causal forward: two products over half of each square."""
        return 2 * heads * width * sum(n * n for n in self.lengths)


def by_document(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Attend with one SDPA call a document."""
    out = []
    for a, b, c in zip(*(x.split(documents.lengths) for x in (q, k, v)), strict=True):
        heads = (x.transpose(0, 1)[None] for x in (a, b, c))
        out.append(scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


def _varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    cu, longest = documents.cu, documents.longest
    out: Any = varlen_attn(q, k, v, cu, cu, longest, longest, **options)
    return out


def _cudnn(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return by_document(q, k, v, documents)


def _flash(module: str) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        import importlib

        call = importlib.import_module(module).flash_attn_varlen_func
        out = call(
            q,
            k,
            v,
            cu_seqlens_q=documents.cu,
            cu_seqlens_k=documents.cu,
            max_seqlen_q=documents.longest,
            max_seqlen_k=documents.longest,
            causal=True,
        )
        return out[0] if isinstance(out, tuple) else out

    return run


def _or1(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    from or1.model import attention

    layout = attention.Layout(
        cu_q=documents.cu, cu_k=documents.cu, max_q=documents.longest, max_k=documents.longest, kv_rows_U=None
    )
    backend = attention.choose_backend("auto", q.device, q.dtype)
    return attention.packed_attention(q, k, v, layout, backend=backend)


CANDIDATES: dict[str, Attention] = {
    "or1, auto": _or1,
    "varlen": _varlen,
    "cudnn": _cudnn,
    "fa4": _flash("flash_attn.cute"),
    "fa3": _flash("flash_attn_interface"),
    "flash 2": _flash("flash_attn"),
    "sdpa": by_document,
}


def run(context: Context) -> None:
    """Compare every candidate with fp64, then time forward and backward."""
    device = context.device
    heads, groups, width = (4, 2, 16) if context.rehearse else (28, 4, 128)
    rows = ((64,), (16,) * 4) if context.rehearse else ((32768,), (8192,) * 4)
    dtype = torch.float32 if context.rehearse else torch.bfloat16
    right = {}
    for name, attention in CANDIDATES.items():
        if context.late():
            context.skip(name, _TIME_IS_UP)
            continue
        try:
            error, plain = errors(attention, device, dtype, (heads, groups, width))
        except Exception as failure:  # noqa: BLE001 - whatever a library raises on this machine is the result
            context.skip(name, first_line(failure))
            continue
        # or1 must be right; a library that is wrong here is a result.
        wrong = not error <= 2 * plain + 8 * torch.finfo(dtype).eps
        failed = {"ok": False} if wrong and name.startswith("or1") else {}
        context.add({"backend": name, "error": error, "plain_error": plain, "right": not wrong} | failed)
        if not wrong:
            right[name] = attention
    for lengths in rows:
        for name, attention in right.items():
            if context.late():
                context.skip(f"{name}, {len(lengths)} documents", _TIME_IS_UP)
                continue
            try:
                context.add(_timed(name, attention, Documents.of(lengths, device), (heads, groups, width), dtype))
            except Exception as failure:  # noqa: BLE001 - as above
                context.skip(f"{name}, {len(lengths)} documents", first_line(failure))


def _inputs(tokens: int, sizes: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v with requires_grad, and an upstream gradient."""
    heads, groups, width = sizes
    gen = torch.Generator(device=device).manual_seed(3)
    shapes = [(tokens, n, width) for n in (heads, groups, groups, heads)]
    made = [torch.randn(shape, generator=gen, device=device).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in made[:3]] + made[3:]


def errors(
    attention: Attention, device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> tuple[float, float]:
    """Return the largest relative error of output and gradients, the candidate's and that of plain torch."""
    documents = Documents.of((37, 1, 129, 64), device)
    *leaves, upstream = _inputs(sum(documents.lengths), sizes, device, dtype)

    def results(call: Attention, kind: torch.dtype) -> list[Tensor]:
        wide = [x.detach().to(kind).requires_grad_() for x in leaves]
        out = call(wide[0], wide[1], wide[2], documents)
        return [out.detach(), *torch.autograd.grad(out, wide, upstream.to(kind))]

    exact = results(_plain, torch.float64)
    return tuple(  # type: ignore[return-value]
        max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(results(call, dtype), exact, strict=True))
        for call in (attention, _plain)
    )


def _plain(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Attend with a softmax over all scores, in the inputs' dtype."""
    out = []
    for a, b, c in zip(*(x.split(documents.lengths) for x in (q, k, v)), strict=True):
        share = a.shape[1] // b.shape[1]
        keys, values = b.repeat_interleave(share, 1), c.repeat_interleave(share, 1)
        scores = torch.einsum("iqd,jqd->qij", a, keys) / a.shape[-1] ** 0.5
        hidden = torch.ones(len(a), len(a), dtype=torch.bool, device=a.device).triu(1)
        out.append(torch.einsum("qij,jqd->iqd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(out)


def _timed(
    name: str, attention: Attention, documents: Documents, sizes: tuple[int, int, int], dtype: torch.dtype
) -> dict:
    device = documents.cu.device
    q, k, v, upstream = _inputs(sum(documents.lengths), sizes, device, dtype)
    out = attention(q, k, v, documents)
    fns = {
        "forward": lambda: attention(q, k, v, documents),
        "backward": lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True),
    }
    times = {key: min(found) for key, found in measure.interleaved(fns, device, rounds=5).items()}
    flops = documents.flops(sizes[0], sizes[2])
    return {
        "backend": name,
        "documents": len(documents.lengths),
        "tokens": sum(documents.lengths),
        "forward_ms": 1e3 * times["forward"],
        "backward_ms": 1e3 * times["backward"],
        "forward_tflops": flops / times["forward"] / 1e12,
        # Backward has five products to forward's two.
        "backward_tflops": 2.5 * flops / times["backward"] / 1e12,
    }
