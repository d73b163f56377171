"""The bench of the attention backends: a packed row of documents, as a layer of the model calls them."""

# T packed tokens, K sampled queries of a document, L tokens of a document, Q query heads, G key-value heads, D head dim

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from or1.core.types import TrainSequence
from or1.model import attention
from or1.model.rows import pack_rows
from or1.tune.accuracy import Outputs
from or1.tune.bench import TorchBench
from or1.tune.case import documents, dtype_of

# Many queries of few documents: a gradient of a key is then a sum of many terms, as in training.
_DOCUMENTS, _QUERIES = 4, 64


class AttentionBench(TorchBench):
    """Runs a backend that `or1.model.attention.register` registers with transformers, and its backward."""

    @cached_property
    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, [T, heads, D]: the projections of a layer are contiguous in this order."""
        case, t, d = self.case, self.case.attention_tokens, self.case.head_dim
        return (
            self.normal(t, case.heads, d).requires_grad_(),
            self.normal(t, case.kv_heads, d).requires_grad_(),
            self.normal(t, case.kv_heads, d).requires_grad_(),
        )

    @cached_property
    def _queries_K(self) -> Tensor:
        lengths = documents(self.case)
        starts = [0, *accumulate(lengths)]
        picked = self.sample(len(lengths), _DOCUMENTS).tolist()
        return torch.cat([starts[s] + self.sample(lengths[s], _QUERIES) for s in picked])

    @cached_property
    def _upstream_TQD(self) -> Tensor:
        case = self.case
        upstream = torch.zeros(case.attention_tokens, case.heads, case.head_dim, device=self.device)
        upstream[self._queries_K] = torch.randn(
            len(self._queries_K), case.heads, case.head_dim, generator=self.random, device=self.device
        )
        return upstream.to(dtype_of(case))

    @cached_property
    def _layout(self) -> dict[str, object]:
        """The layout of the row in the form in which a decoder gets it."""
        sequences = [_sequence(length) for length in documents(self.case)]
        (row,) = pack_rows(sequences, [range(len(sequences))], self.device)
        return attention.Layout.of(row).as_kwargs()

    def run(self, options: Mapping[str, Any]) -> None:
        """Compute the output and three gradients. Raises AttentionError for a backend that cannot run."""
        backend = attention.choose_backend(options.get("attention", "auto"), self.device, dtype_of(self.case))
        name = attention.register(backend)
        for x in self._inputs:
            x.grad = None
        # [1, heads, T, D], as transformers passes them.
        q, k, v = (x.transpose(0, 1)[None] for x in self._inputs)
        with attention.packed_forward():
            out, _ = AttentionInterface()[name](
                nn.Module(), q, k, v, None, scaling=self.case.head_dim**-0.5, **self._layout
            )
        self._out_TQD = out[0]
        self._out_TQD.backward(self._upstream_TQD)

    def outputs(self) -> Outputs:
        """Return the output of the sampled queries and the gradients."""
        q, k, v = self._inputs
        assert q.grad is not None and k.grad is not None and v.grad is not None
        dq_TQD = q.grad
        others_T = torch.ones(len(dq_TQD), dtype=torch.bool, device=self.device)
        others_T[self._queries_K] = False
        return {
            "out": self._out_TQD.detach()[self._queries_K],
            "dq": dq_TQD[self._queries_K],
            "dk": k.grad,
            "dv": v.grad,
            "others": dq_TQD[others_T].abs().amax().reshape(1) if bool(others_T.any()) else dq_TQD[:0, 0, 0],
        }

    def exact(self, dtype: torch.dtype) -> Outputs:
        """Return the same by softmax over all keys of the sampled queries, document by document."""
        q, k, v = (x.detach().transpose(0, 1) for x in self._inputs)
        out_KQD, dq_KQD = (
            torch.empty(len(self._queries_K), self.case.heads, self.case.head_dim, dtype=dtype, device=self.device)
            for _ in range(2)
        )
        dk_GTD, dv_GTD = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        width = self.case.heads // self.case.kv_heads
        for inside_K, whole in self._documents():
            at_K = self._queries_K[inside_K]
            seen_KL = torch.arange(whole.start, whole.stop, device=self.device) <= at_K[:, None]
            for g in range(self.case.kv_heads):
                heads = slice(g * width, (g + 1) * width)
                leaves = [x.to(dtype).requires_grad_() for x in (q[heads, at_K], k[g, whole], v[g, whole])]
                q_WKD, k_LD, v_LD = leaves
                scores_WKL = (q_WKD @ k_LD.T * self.case.head_dim**-0.5).masked_fill(~seen_KL, -torch.inf)
                out_WKD = scores_WKL.softmax(-1) @ v_LD
                upstream_WKD = self._upstream_TQD[at_K, heads].transpose(0, 1).to(dtype)
                dq_WKD, dk_LD, dv_LD = torch.autograd.grad(out_WKD, leaves, upstream_WKD)
                out_KQD[inside_K, heads] = out_WKD.detach().transpose(0, 1)
                dq_KQD[inside_K, heads] = dq_WKD.transpose(0, 1)
                dk_GTD[g, whole], dv_GTD[g, whole] = dk_LD, dv_LD
        others = 1 if len(self._queries_K) < self.case.attention_tokens else 0
        zero = torch.zeros(others, dtype=dtype, device=self.device)
        dk_TGD, dv_TGD = dk_GTD.transpose(0, 1), dv_GTD.transpose(0, 1)
        return {"out": out_KQD, "dq": dq_KQD, "dk": dk_TGD, "dv": dv_TGD, "others": zero}

    def _documents(self) -> Iterator[tuple[Tensor, slice]]:
        """Yield the sampled queries of each document, as bool[K], and the tokens of the document."""
        start = 0
        for length in documents(self.case):
            whole = slice(start, start + length)
            inside_K = (self._queries_K >= whole.start) & (self._queries_K < whole.stop)
            if bool(inside_K.any()):
                yield inside_K, whole
            start += length


def _sequence(length: int) -> TrainSequence:
    """Return a sequence of `length` packed tokens."""
    response = np.zeros(length, np.int32)
    return TrainSequence(np.zeros(1, np.int32), response, np.zeros(length, np.float32), advantage=0.0)
