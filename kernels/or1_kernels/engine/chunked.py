"""The loop over chunks of rows: three GEMMs a chunk, never a [tokens, vocab] tensor.

    raw  = h_c W^T + b      GEMM 1, written as fp32 for any input dtype but fp64
    draw = dL/draw          the two row passes of `rows`, in place, with the objective between them
    dh_c = draw W           GEMM 2
    dW  += draw^T h_c       GEMM 3, accumulated in fp32

All inputs of one call share a dtype. Logits, statistics and sums are fp64 for fp64 inputs, else fp32.
Legend: N rows, C rows of a chunk, K rows kept of a chunk, H hidden, V vocab.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows import Backend, RowStats, Transform, finish
from . import gemms, host
from .vocab_parallel import VocabShard

# Target size of a chunk's logits buffer. Below _MIN_CHUNK rows the GEMMs are too small to be efficient.
_CPU_BUFFER_BYTES = {"fast": 128 << 20, "lean": 32 << 20}
_MIN_CHUNK = {"fast": 256, "lean": 64}
_GPU_CHUNK = {"fast": 4096, "lean": 1024}
PRESETS = tuple(_GPU_CHUNK)


class RowInputs(NamedTuple):
    """Inputs of each row: hidden [N, H], targets i64[N] (ids in this shard, else -1), 1 / temperature [N]."""

    hidden: Tensor
    targets: Tensor
    inv_tau: Tensor

    def rows(self, index: slice | Tensor) -> "RowInputs":
        """Return the rows that a slice or an index tensor selects."""
        return RowInputs(self.hidden[index], self.targets[index], self.inv_tau[index])


class Slopes(NamedTuple):
    """dL/dlogp and dL/dentropy of each row; keep: bool[N], the rows that enter the backward GEMMs (None: all)."""

    logp: Tensor
    entropy: Tensor
    keep: Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """Settings of one call.

    transform    of the raw logits
    backend      implementation of the row passes
    shard        this rank's part of the vocabulary; None: the whole
    preset       "fast": large chunks, dW accumulated in fp32; "lean": small chunks, dW in the weight's dtype
    chunk_rows   rows a chunk; None: by preset and size
    stash_bytes  raw logits that a scoring call may keep for its backward instead of recomputing them, in bytes
    """

    transform: Transform
    backend: Backend
    shard: VocabShard | None = None
    preset: str = "fast"
    chunk_rows: int | None = None
    stash_bytes: int = 0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, statistics and accumulated gradients: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Engine:
    """GEMMs and gradient accumulators of one call, over weight [V, H] and bias [V] (or None)."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, settings: Settings, num_rows: int) -> None:
        self.acc = compute_dtype(weight_VH.dtype)
        self.settings = settings
        self.num_rows = num_rows
        self.gemms = gemms.choose(weight_VH, num_rows)
        self.param_dtype = weight_VH.dtype
        self.weight_VH = weight_VH.to(self.gemms.operand)
        self.bias_V = None if bias_V is None else bias_V.to(self.acc)
        self.buffer_CV: Tensor | None = None
        self.dhidden_NH: Tensor | None = None
        self.dweight_VH: Tensor | None = None
        self.dbias_V: Tensor | None = None

    def chunks(self) -> Iterator[slice]:
        """Yield slices of nearly equal length: a much shorter last chunk could take another GEMM code path."""
        count = -(-self.num_rows // self._chunk_rows())
        for i in range(count):
            yield slice(i * self.num_rows // count, (i + 1) * self.num_rows // count)

    def want_grads(self, needs: tuple[bool, bool, bool], main_grad_VH: Tensor | None = None) -> None:
        """Allocate zeroed accumulators for (hidden, weight, bias) where needed; main_grad replaces the weight's."""
        (vocab, width), device = self.weight_VH.shape, self.weight_VH.device
        # GEMM 2 writes each row once and adds nothing to it, so dhidden may have the operands' dtype.
        self.dhidden_NH = None
        if needs[0]:
            self.dhidden_NH = torch.zeros(self.num_rows, width, dtype=self.gemms.operand, device=device)
        self.dweight_VH = main_grad_VH
        if main_grad_VH is None and needs[1]:
            dtype = self.param_dtype if self.settings.preset == "lean" else self.acc
            self.dweight_VH = host.zeros((vocab, width), dtype, device)
        self.dbias_V = torch.zeros(vocab, dtype=self.acc, device=device) if needs[2] else None

    def logits(self, hidden_CH: Tensor, keep: bool = False) -> Tensor:
        """Run GEMM 1: return raw logits [C, V]. Without `keep` they lie in a buffer that the next call overwrites."""
        num_rows, vocab = hidden_CH.shape[0], self.weight_VH.shape[0]
        if keep:
            out_CV = host.empty((num_rows, vocab), self.acc, hidden_CH.device)
        else:
            if self.buffer_CV is None or self.buffer_CV.shape[0] < num_rows:
                self.buffer_CV = None  # Free the old buffer before the larger one is allocated.
                self.buffer_CV = host.empty((num_rows, vocab), self.acc, hidden_CH.device)
            out_CV = self.buffer_CV[:num_rows]
        self.gemms.logits(hidden_CH, self.weight_VH, out_CV)
        return out_CV if self.bias_V is None else out_CV.add_(self.bias_V)

    def stats(self, raw_CV: Tensor, inputs: RowInputs) -> RowStats:
        """Return the statistics of a chunk (pass 1). Its raw logits are not changed."""
        settings = self.settings
        sums = settings.backend.row_sums(raw_CV, inputs.targets, inputs.inv_tau, settings.transform)
        if settings.shard is not None:
            sums = settings.shard.join(sums, inputs.inv_tau)
        return finish(sums, inputs.inv_tau)

    def backward(self, raw_CV: Tensor, rows: slice, inputs: RowInputs, stats: RowStats, slopes: Slopes) -> None:
        """Run pass 2 and GEMMs 2 and 3 for one chunk. Overwrites its raw logits."""
        index_K = None
        if slopes.keep is not None:
            index_K = slopes.keep.nonzero()[:, 0]
            raw_CV, inputs, stats = raw_CV[index_K], inputs.rows(index_K), RowStats(*(x[index_K] for x in stats))
            slopes = Slopes(slopes.logp[index_K], slopes.entropy[index_K])
        draw_CV = self.settings.backend.row_grads_(
            raw_CV,
            inputs.targets,
            inputs.inv_tau,
            self.settings.transform,
            stats,
            (slopes.logp, slopes.entropy),
            out_dtype=self.gemms.operand,
        )
        gemms.zero_behind_rows(draw_CV)
        if self.dbias_V is not None:
            self.dbias_V += draw_CV.sum(0, dtype=self.acc)
        if self.dhidden_NH is not None:
            if index_K is None:
                torch.mm(draw_CV, self.weight_VH, out=self.dhidden_NH[rows])
            else:
                self.dhidden_NH[rows].index_copy_(0, index_K, draw_CV @ self.weight_VH)
        if self.dweight_VH is not None:
            self.gemms.add_dweight(draw_CV, inputs.hidden, self.dweight_VH)

    def grads(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (dhidden, dweight, dbias), dhidden summed over the vocabulary shards; None where not needed."""
        if self.settings.shard is not None and self.dhidden_NH is not None:
            self.settings.shard.sum_(self.dhidden_NH)
        return self.dhidden_NH, self.dweight_VH, self.dbias_V

    def _chunk_rows(self) -> int:
        settings = self.settings
        if settings.chunk_rows is not None:
            return settings.chunk_rows
        if self.weight_VH.is_cuda:
            return _GPU_CHUNK[settings.preset]
        row_bytes = self.weight_VH.shape[0] * self.acc.itemsize
        return max(_MIN_CHUNK[settings.preset], _CPU_BUFFER_BYTES[settings.preset] // row_bytes)


def score(engine: Engine, inputs: RowInputs, may_stash: bool = False) -> tuple[RowStats, list[Tensor | None]]:
    """Return the statistics of all rows and each chunk's raw logits, None where not kept. One GEMM a chunk.

    With may_stash, chunks are kept in order until settings.stash_bytes is used up.
    """
    out = _empty_stats(engine, inputs)
    stash: list[Tensor | None] = []
    budget = engine.settings.stash_bytes if may_stash else 0
    for c in engine.chunks():
        chunk = inputs.rows(c)
        size = len(chunk.hidden) * engine.weight_VH.shape[0] * engine.acc.itemsize
        keep, budget = size <= budget, budget - size
        raw_CV = engine.logits(chunk.hidden, keep)
        _store(out, c, engine.stats(raw_CV, chunk))
        stash.append(raw_CV if keep else None)
    return out, stash


def score_backward(
    engine: Engine, inputs: RowInputs, stats: RowStats, slopes: Slopes, stash: list[Tensor | None]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients for any upstream slopes.

    Logits come from the stash, which this empties, or from a fourth GEMM.
    """
    for i, c in enumerate(engine.chunks()):
        chunk = inputs.rows(c)
        raw_CV, stash[i] = stash[i], None
        if raw_CV is None:
            raw_CV = engine.logits(chunk.hidden)
        chunk_stats = RowStats(*(x[c] for x in stats))
        engine.backward(raw_CV, c, chunk, chunk_stats, Slopes(slopes.logp[c], slopes.entropy[c]))
    return engine.grads()


def score_and_grads(engine: Engine, inputs: RowInputs, slopes_of: Callable[[slice, RowStats], Slopes]) -> RowStats:
    """Return the statistics of all rows and accumulate their gradients. Three GEMMs a chunk.

    slopes_of(rows, stats of these rows) -> Slopes; a row's slopes may depend on that row only.
    """
    out = _empty_stats(engine, inputs)
    for c in engine.chunks():
        chunk = inputs.rows(c)
        raw_CV = engine.logits(chunk.hidden)
        chunk_stats = engine.stats(raw_CV, chunk)
        _store(out, c, chunk_stats)
        engine.backward(raw_CV, c, chunk, chunk_stats, slopes_of(c, chunk_stats))
    return out


def _empty_stats(engine: Engine, inputs: RowInputs) -> RowStats:
    device = inputs.hidden.device
    return RowStats(*(torch.empty(engine.num_rows, dtype=engine.acc, device=device) for _ in RowStats._fields))


def _store(out: RowStats, rows: slice, chunk: RowStats) -> None:
    for whole_N, part_C in zip(out, chunk, strict=True):
        whole_N[rows] = part_C
