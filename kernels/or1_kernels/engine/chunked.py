"""The loop over chunks of rows: three GEMMs a chunk, never a [tokens, vocab] tensor.

    raw  = h_c W^T + b      GEMM 1, written as fp32 for any input dtype but fp64
    draw = dL/draw          the two row passes of `rows`, in place, with the objective between them
    dh_c = draw W           GEMM 2
    dW  += draw^T h_c       GEMM 3, accumulated in fp32

All inputs of one call share a dtype. Logits, statistics and sums are fp64 for fp64 inputs, else fp32.
Legend: N rows, C rows of a chunk, K rows kept of a chunk, H hidden, V vocab.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows import Backend, PolicyDraw, RowStats, TokenConstants, Transform, finish
from . import exp_gemm, gemms, host, wide
from .vocab_parallel import VocabShard

# Target size of a chunk's logits buffer. Below _MIN_CHUNK rows the GEMMs are too small to be efficient.
_CPU_BUFFER_BYTES = {"fast": 128 << 20, "lean": 32 << 20}
_MIN_CHUNK = {"fast": 256, "lean": 64}
PRESETS = tuple(_MIN_CHUNK)
# Rows of the logits start at multiples of so many bytes on a GPU, so that kernels read 128 bits at a time.
_ROW_BYTES = 64
# GEMMs whose GEMM 3 can overwrite what dW held.
_WRITERS = (wide.Wide, gemms.Upcast, gemms.HostWideOut)


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
        self.gemms = wide.choose(weight_VH, num_rows)
        self.param_dtype = weight_VH.dtype
        self.weight_VH = weight_VH.to(self.gemms.operand)
        self.bias_V = None if bias_V is None else bias_V.to(self.acc)
        self.buffer_CV: Tensor | None = None
        self.dhidden_NH: Tensor | None = None
        self.dweight_VH: Tensor | None = None
        self.dbias_V: Tensor | None = None
        self.unit: Tensor | None = None
        self.main_grad_VH: Tensor | None = None
        self.dweight_is_empty = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Enter the loop over chunks: the GEMMs of a GPU keep partial sums in fp32; at the end the buffer is free."""
        with wide.fp32_sums() if self.weight_VH.is_cuda else nullcontext():
            yield
        buffer_CV, self.buffer_CV = self.buffer_CV, None
        if buffer_CV is not None and not self.weight_VH.is_cuda:
            host.give_back(buffer_CV)

    def chunks(self) -> Iterator[slice]:
        """Yield slices of rows: nearly equal ones on a CPU, whole tiles of 128 rows on a GPU.

        A much shorter last chunk could take another GEMM code path.
        """
        rows = self._chunk_rows()
        if self.weight_VH.is_cuda and self.settings.chunk_rows is None:
            for start in range(0, self.num_rows, rows):
                yield slice(start, min(start + rows, self.num_rows))
            return
        count = -(-self.num_rows // rows)
        for i in range(count):
            yield slice(i * self.num_rows // count, (i + 1) * self.num_rows // count)

    def want_grads(
        self, needs: tuple[bool, bool, bool], main_grad_VH: Tensor | None = None, unit: Tensor | None = None
    ) -> None:
        """Allocate accumulators for (hidden, weight, bias) where needed; main_grad replaces the weight's.

        unit  [], the slopes of all chunks are in this unit, and `grads` multiplies by it; None: 1
        """
        (vocab, width), device = self.weight_VH.shape, self.weight_VH.device
        self.unit, self.dhidden_NH = unit, None
        # GEMM 2 writes each row once and adds nothing to it, so dhidden may have the operands' dtype. Rows that
        # grad_row_eps drops stay 0.
        if needs[0]:
            self.dhidden_NH = torch.zeros(self.num_rows, width, dtype=self.gemms.operand, device=device)
        self.main_grad_VH, self.dweight_VH = main_grad_VH, None
        if main_grad_VH is not None and unit is None:
            self.dweight_VH = main_grad_VH
        elif main_grad_VH is not None or needs[1]:
            lean = self.settings.preset == "lean" and unit is None
            # GEMM 3 of the first chunk writes all of dW where it can do without zeros.
            self.dweight_is_empty = isinstance(self.gemms, _WRITERS) and self.num_rows > 0
            new = host.empty if self.dweight_is_empty else host.zeros
            self.dweight_VH = new((vocab, width), self.param_dtype if lean else self.acc, device)
        self.dbias_V = torch.zeros(vocab, dtype=self.acc, device=device) if needs[2] else None

    def want_score_grads(
        self, needs: tuple[bool, bool, bool], slopes: Slopes, main_grad_VH: Tensor | None = None
    ) -> Slopes:
        """Call want_grads for given slopes of all rows, and return them in the unit of the gradients."""
        unit = wide.unit_of(torch.cat(slopes[:2])) if self.gemms.operand == torch.float16 else None
        self.want_grads(needs, main_grad_VH, unit)
        return slopes if unit is None else Slopes(slopes.logp / unit, slopes.entropy / unit, slopes.keep)

    def logits(self, hidden_CH: Tensor, keep: bool = False) -> Tensor:
        """Run GEMM 1: return raw logits [C, V]. Without `keep` they lie in a buffer that the next call overwrites."""
        num_rows, vocab = hidden_CH.shape[0], self.weight_VH.shape[0]
        if keep:
            out_CV = self._new_logits(num_rows, vocab)
        else:
            if self.buffer_CV is None or self.buffer_CV.shape[0] < num_rows:
                self.buffer_CV = None  # Free the old buffer before the larger one is allocated.
                self.buffer_CV = self._new_logits(num_rows, vocab, borrowed=True)
            out_CV = self.buffer_CV[:num_rows]
        self.gemms.logits(hidden_CH, self.weight_VH, out_CV)
        return out_CV if self.bias_V is None else out_CV.add_(self.bias_V)

    def _new_logits(self, num_rows: int, vocab: int, borrowed: bool = False) -> Tensor:
        if borrowed and self.weight_VH.device.type == "cpu":
            return host.borrow(self.weight_VH, (num_rows, vocab), self.acc)
        step = _ROW_BYTES // self.acc.itemsize if self.weight_VH.is_cuda else 1
        padded = -(-vocab // step) * step
        return host.empty((num_rows, padded), self.acc, self.weight_VH.device)[:, :vocab]

    def stats(self, raw_CV: Tensor, inputs: RowInputs) -> RowStats:
        """Return the statistics of a chunk (pass 1). Its raw logits are not changed."""
        settings = self.settings
        sums = settings.backend.row_sums(raw_CV, inputs.targets, inputs.inv_tau, settings.transform)
        if settings.shard is not None:
            sums = settings.shard.join(sums, inputs.inv_tau)
        return finish(sums, inputs.inv_tau)

    def backward(self, raw_CV: Tensor, rows: slice, inputs: RowInputs, stats: RowStats, slopes: Slopes) -> None:
        """Run pass 2 and GEMMs 2 and 3 for one chunk. Overwrites its raw logits."""
        index_K = None if slopes.keep is None else slopes.keep.nonzero()[:, 0]
        if index_K is not None and not len(index_K):
            # Row passes in C++ refuse an empty array, and GEMM 3 would write nothing.
            if self.dweight_VH is not None and self.dweight_is_empty:
                self.dweight_VH.zero_()
                self.dweight_is_empty = False
            return
        if index_K is not None and len(index_K) == len(raw_CV):
            index_K = None  # No row is dropped, so no row need be copied.
        if index_K is not None:
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
        self._gemms_2_and_3(draw_CV, inputs.hidden, rows, index_K)

    def _gemms_2_and_3(self, draw_CV: Tensor, hidden_CH: Tensor, rows: slice, index_K: Tensor | None = None) -> None:
        if self.dhidden_NH is not None:
            if index_K is None:
                torch.mm(draw_CV, self.weight_VH, out=self.dhidden_NH[rows])
            else:
                self.dhidden_NH[rows].index_copy_(0, index_K, draw_CV @ self.weight_VH)
        self._gemm_3(draw_CV, hidden_CH)

    def _gemm_3(self, draw_CV: Tensor, hidden_CH: Tensor) -> None:
        if self.dweight_VH is None:
            return
        if self.dweight_is_empty and isinstance(self.gemms, _WRITERS):
            self.gemms.set_dweight(draw_CV, hidden_CH, self.dweight_VH)
            self.dweight_is_empty = False
        else:
            self.gemms.add_dweight(draw_CV, hidden_CH, self.dweight_VH)

    def policy(self, rows: slice, inputs: RowInputs, constants: TokenConstants) -> PolicyDraw:
        """Run the three GEMMs of a chunk, and both row passes with the objective in one call."""
        settings, kernel = self.settings, self.settings.backend.policy_rows_
        if (gemm := self._exp_gemm(constants)) is not None:
            out = exp_gemm.policy_rows(
                gemm,
                inputs,
                self.weight_VH,
                settings.transform.scale,
                constants,
                self._exponentials(len(inputs.hidden)),
            )
        else:
            assert kernel is not None
            raw_CV = self.logits(inputs.hidden)
            out = kernel(
                raw_CV, inputs.targets, inputs.inv_tau, settings.transform, constants, out_dtype=self.gemms.operand
            )
        draw_CV, factor_C = out.draw_CV, out.factor_C
        gemms.zero_behind_rows(draw_CV)
        if factor_C is None:
            if self.dbias_V is not None:
                self.dbias_V += draw_CV.sum(0, dtype=self.acc)
            self._gemms_2_and_3(draw_CV, inputs.hidden, rows)
            return out
        factor_C1 = factor_C[:, None]
        if self.dhidden_NH is not None:
            # The factor multiplies an fp32 result where the GEMM can write one.
            mm = self.gemms.wide_mm if isinstance(self.gemms, wide.Wide) else torch.mm
            torch.mul(mm(draw_CV, self.weight_VH), factor_C1, out=self.dhidden_NH[rows])
        self._gemm_3(draw_CV, (inputs.hidden * factor_C1).to(self.gemms.operand))
        return out

    def _exp_gemm(self, constants: TokenConstants) -> exp_gemm.ExpGemm | None:
        """Return the fused GEMM 1 if the backend has one and this loss has its form."""
        plain = self.settings.transform.softcap is None and self.bias_V is None
        fits = constants.one_sweep and plain and self.gemms.operand == torch.bfloat16
        return self.settings.backend.exp_gemm if fits else None

    def _exponentials(self, num_rows: int) -> Tensor:
        """Return memory for E of a chunk, bf16 [C, V] and contiguous."""
        if self.buffer_CV is None or self.buffer_CV.shape[0] < num_rows:
            self.buffer_CV = None
            shape = (num_rows, self.weight_VH.shape[0])
            self.buffer_CV = host.empty(shape, torch.bfloat16, self.weight_VH.device)
        return self.buffer_CV[:num_rows]

    def grads(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (dhidden, dweight, dbias), dhidden summed over the vocabulary shards; None where not needed."""
        if self.unit is not None:
            self._leave_unit(self.unit)
        if self.settings.shard is not None and self.dhidden_NH is not None:
            self.settings.shard.sum_(self.dhidden_NH)
        return self.dhidden_NH, self.dweight_VH, self.dbias_V

    def _leave_unit(self, unit: Tensor) -> None:
        # In fp32: in fp16 the gradients would vanish, and backward multiplies them by the caller's loss scale first.
        self.dhidden_NH, self.dweight_VH, self.dbias_V = (
            None if x is None else x.to(self.acc).mul_(unit) for x in (self.dhidden_NH, self.dweight_VH, self.dbias_V)
        )
        if self.main_grad_VH is not None and self.dweight_VH is not None:
            self.main_grad_VH += self.dweight_VH
            self.dweight_VH = self.main_grad_VH
        self.unit = None

    def _chunk_rows(self) -> int:
        settings = self.settings
        if settings.chunk_rows is not None:
            return settings.chunk_rows
        if self.weight_VH.is_cuda:
            shape_VH = (self.weight_VH.shape[0], self.weight_VH.shape[1])
            return wide.chunk_rows(self.num_rows, shape_VH, settings.preset, self.weight_VH.device)
        row_bytes = self.weight_VH.shape[0] * self.acc.itemsize
        return max(_MIN_CHUNK[settings.preset], _CPU_BUFFER_BYTES[settings.preset] // row_bytes)


def score(engine: Engine, inputs: RowInputs, may_stash: bool = False) -> tuple[RowStats, list[Tensor | None]]:
    """Return the statistics of all rows and each chunk's raw logits, None where not kept. One GEMM a chunk.

    With may_stash, chunks are kept in order until settings.stash_bytes is used up.
    """
    out = _empty_stats(engine, inputs)
    stash: list[Tensor | None] = []
    budget = engine.settings.stash_bytes if may_stash else 0
    with engine.running():
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
    with engine.running():
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
    with engine.running():
        for c in engine.chunks():
            chunk = inputs.rows(c)
            raw_CV = engine.logits(chunk.hidden)
            chunk_stats = engine.stats(raw_CV, chunk)
            _store(out, c, chunk_stats)
            engine.backward(raw_CV, c, chunk, chunk_stats, slopes_of(c, chunk_stats))
    return out


class PolicyTerms(NamedTuple):
    """Per-row results of a policy pass, each [N]: log-prob, entropy, token loss, ratio, and whether the clip acted."""

    logp: Tensor
    entropy: Tensor
    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def policy_and_grads(engine: Engine, inputs: RowInputs, constants_of: Callable[[slice], TokenConstants]) -> PolicyTerms:
    """Run score_and_grads with a backend that computes the objective between its passes. Three GEMMs a chunk."""
    terms = [inputs.inv_tau.new_empty(engine.num_rows) for _ in range(4)]
    clipped_N = torch.empty(engine.num_rows, dtype=torch.bool, device=inputs.inv_tau.device)
    out = PolicyTerms(terms[0], terms[1], terms[2], terms[3], clipped_N)
    with engine.running():
        for c in engine.chunks():
            chunk = inputs.rows(c)
            draw = engine.policy(c, chunk, constants_of(c))
            parts = (draw.logp_C, draw.entropy_C, draw.loss_C, draw.ratio_C, draw.clipped_C)
            for whole_N, part_C in zip(out, parts, strict=True):
                whole_N[c] = part_C
    return out


def _empty_stats(engine: Engine, inputs: RowInputs) -> RowStats:
    device = inputs.hidden.device
    return RowStats(*(torch.empty(engine.num_rows, dtype=engine.acc, device=device) for _ in RowStats._fields))


def _store(out: RowStats, rows: slice, chunk: RowStats) -> None:
    for whole_N, part_C in zip(out, chunk, strict=True):
        whole_N[rows] = part_C
