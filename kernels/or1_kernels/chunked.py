"""The engine: rows in chunks, three GEMMs a chunk, never a [tokens, vocab] tensor.

    raw  = h_c W^T + b      GEMM 1, written as fp32 whatever the inputs are
    draw = dL/draw          the two row passes of `rows`, in place, the objective applied between them
    dh_c = draw W           GEMM 2
    dW  += draw^T h_c       GEMM 3, accumulated in fp32

All inputs of one call share a dtype; fp64 inputs are computed in fp64 throughout, everything else in fp32.
Legend: N rows, C rows of a chunk, H hidden, V vocab.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import Backend
from .rows import RowStats, Transform, finish

# The logits buffer of one chunk aims at this many bytes; below _MIN_CHUNK rows the GEMMs starve.
_CPU_BUFFER_BYTES = 128 << 20
_MIN_CHUNK = 256
_GPU_CHUNK = 4096


@dataclass(frozen=True)
class Grads:
    """Gradients in the accumulation dtype; None where not asked for. hidden [N, H], weight [V, H], bias [V]."""

    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


@dataclass(frozen=True)
class Settings:
    """How one call computes: transform of the logits, row-pass backend, rows a chunk (None: chosen by size)."""

    transform: Transform
    backend: Backend
    chunk_rows: int | None = None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 inputs, else fp32: the dtype of logits, statistics and accumulated gradients."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Slices of nearly equal length, so that no chunk is so short that its GEMM takes another code path."""
    count = -(-num_rows // chunk_rows)
    for i in range(count):
        yield slice(i * num_rows // count, (i + 1) * num_rows // count)


class Engine:
    """One call's GEMMs and accumulators over weight [V, H] and bias [V] (or None)."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, settings: Settings) -> None:
        self.acc = compute_dtype(weight_VH.dtype)
        self.settings = settings
        self.weight_VH = weight_VH if self._mixed(weight_VH) else weight_VH.to(self.acc)
        self.bias_V = None if bias_V is None else bias_V.to(self.acc)
        self.buffer_CV: Tensor | None = None
        self.dhidden_NH: Tensor | None = None
        self.dweight_VH: Tensor | None = None
        self.dbias_V: Tensor | None = None

    def chunks(self, num_rows: int) -> Iterator[slice]:
        """The row chunks of a call with this many rows."""
        return chunks(num_rows, min(self._chunk_rows(), max(num_rows, 1)))

    def want_grads(self, hidden_NH: Tensor, needs: tuple[bool, bool, bool]) -> None:
        """Allocate zeroed accumulators for (hidden, weight, bias) as asked."""
        like = {"dtype": self.acc, "device": hidden_NH.device}
        # GEMM 2 of one chunk writes each row once, so a low-precision result loses nothing to accumulation.
        dhidden = like | {"dtype": hidden_NH.dtype} if self._mixed(hidden_NH) else like
        self.dhidden_NH = torch.zeros(hidden_NH.shape, **dhidden) if needs[0] else None
        self.dweight_VH = torch.zeros(self.weight_VH.shape, **like) if needs[1] else None
        self.dbias_V = torch.zeros(self.weight_VH.shape[0], **like) if needs[2] else None

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """GEMM 1: raw logits [C, V] in a buffer that the next call overwrites."""
        num_rows, vocab = hidden_CH.shape[0], self.weight_VH.shape[0]
        if self.buffer_CV is None or self.buffer_CV.shape[0] < num_rows:
            self.buffer_CV = None  # freed before its larger successor is allocated
            self.buffer_CV = torch.empty(num_rows, vocab, dtype=self.acc, device=hidden_CH.device)
        out_CV = self.buffer_CV[:num_rows]
        if self._mixed(hidden_CH):
            torch.mm(hidden_CH, self.weight_VH.T, out_dtype=torch.float32, out=out_CV)
        else:
            torch.mm(hidden_CH.to(self.acc), self.weight_VH.T, out=out_CV)
        return out_CV if self.bias_V is None else out_CV.add_(self.bias_V)

    def stats(self, raw_CV: Tensor, targets_C: Tensor, inv_tau_C: Tensor) -> RowStats:
        """Pass 1 over the chunk's raw logits, which stay as they are."""
        sums = self.settings.backend.row_sums(raw_CV, targets_C, inv_tau_C, self.settings.transform)
        return finish(sums, inv_tau_C)

    def backward(
        self,
        raw_CV: Tensor,
        rows: slice,
        inputs: tuple[Tensor, Tensor, Tensor],
        stats: RowStats,
        slopes: tuple[Tensor, Tensor],
    ) -> None:
        """Pass 2 and GEMMs 2 and 3 for one chunk. inputs = (hidden_CH, targets_C, inv_tau_C)."""
        hidden_CH, targets_C, inv_tau_C = inputs
        transform = self.settings.transform
        mixed = self._mixed(hidden_CH)
        draw_CV = self.settings.backend.row_grads_(raw_CV, targets_C, inv_tau_C, transform, stats, slopes,
                                                   hidden_CH.dtype if mixed else None)
        if self.dbias_V is not None:
            self.dbias_V += draw_CV.sum(0, dtype=self.acc)
        if self.dhidden_NH is not None:
            torch.mm(draw_CV, self.weight_VH, out=self.dhidden_NH[rows])
        if self.dweight_VH is None:
            return
        if mixed:
            torch.addmm(self.dweight_VH, draw_CV.T, hidden_CH, out_dtype=torch.float32, out=self.dweight_VH)
        else:
            torch.addmm(self.dweight_VH, draw_CV.T, hidden_CH.to(self.acc), out=self.dweight_VH)

    def grads(self) -> Grads:
        """What has been accumulated."""
        return Grads(self.dhidden_NH, self.dweight_VH, self.dbias_V)

    @staticmethod
    def _mixed(tensor: Tensor) -> bool:
        # CPU builds of torch have no GEMM with low-precision inputs and an fp32 output; fp16 gradients underflow.
        return tensor.is_cuda and tensor.dtype == torch.bfloat16

    def _chunk_rows(self) -> int:
        if self.settings.chunk_rows is not None:
            return self.settings.chunk_rows
        if self.weight_VH.is_cuda:
            return _GPU_CHUNK
        return max(_MIN_CHUNK, _CPU_BUFFER_BYTES // (self.weight_VH.shape[0] * self.acc.itemsize))


def score(engine: Engine, hidden_NH: Tensor, targets_N: Tensor, inv_tau_N: Tensor) -> RowStats:
    """Statistics of all rows; one GEMM a chunk."""
    num_rows = hidden_NH.shape[0]
    out = RowStats(*(torch.empty(num_rows, dtype=engine.acc, device=hidden_NH.device) for _ in RowStats._fields))
    for c in engine.chunks(num_rows):
        _store(out, c, engine.stats(engine.logits(hidden_NH[c]), targets_N[c], inv_tau_N[c]))
    return out


def score_backward(
    engine: Engine,
    inputs: tuple[Tensor, Tensor, Tensor],
    stats: RowStats,
    slopes: tuple[Tensor, Tensor],
) -> Grads:
    """Gradients for arbitrary upstream slopes; logits recomputed, so three GEMMs a chunk after score's one.

    inputs = (hidden_NH, targets_N, inv_tau_N); slopes = (dL/dlogp, dL/dentropy), contiguous [N] in engine.acc.
    """
    for c in engine.chunks(inputs[0].shape[0]):
        hidden_CH, targets_C, inv_tau_C = (x[c] for x in inputs)
        chunk_stats = RowStats(*(x[c] for x in stats))
        raw_CV = engine.logits(hidden_CH)
        engine.backward(raw_CV, c, (hidden_CH, targets_C, inv_tau_C), chunk_stats, (slopes[0][c], slopes[1][c]))
    return engine.grads()


def score_and_grads(
    engine: Engine,
    inputs: tuple[Tensor, Tensor, Tensor],
    slopes_of: Callable[[slice, RowStats], tuple[Tensor, Tensor]],
) -> RowStats:
    """Statistics and gradients in one go, three GEMMs a chunk in all.

    slopes_of(rows, stats of these rows) -> (dL/dlogp, dL/dentropy) may depend on these rows only.
    """
    num_rows = inputs[0].shape[0]
    out = RowStats(*(torch.empty(num_rows, dtype=engine.acc, device=inputs[0].device) for _ in RowStats._fields))
    for c in engine.chunks(num_rows):
        hidden_CH, targets_C, inv_tau_C = (x[c] for x in inputs)
        raw_CV = engine.logits(hidden_CH)
        chunk_stats = engine.stats(raw_CV, targets_C, inv_tau_C)
        _store(out, c, chunk_stats)
        engine.backward(raw_CV, c, (hidden_CH, targets_C, inv_tau_C), chunk_stats, slopes_of(c, chunk_stats))
    return out


def _store(out: RowStats, rows: slice, chunk: RowStats) -> None:
    for whole_N, part_C in zip(out, chunk, strict=True):
        whole_N[rows] = part_C
