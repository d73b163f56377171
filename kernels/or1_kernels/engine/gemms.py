"""GEMMs of a chunk, by what the device offers: fp32 results from inputs of any precision.

    logits       raw   = h W^T        written as fp32 (fp64 for fp64 inputs)
    add_dweight  dW   += draw^T h     into an accumulator of any dtype

`operand` is the dtype that the GEMMs read. Pass 2 writes draw in this dtype, so dh = draw W is a plain matmul.
Legend: C rows of a chunk, H hidden, V vocab.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import host
from .preference import cpu_gemms

# Below this many multiplications a call, creating oneDNN's bf16 kernel for a new shape costs more than it saves.
_BF16_CPU_WORK = 1 << 31


@dataclass(frozen=True)
class Upcast:
    """GEMMs on inputs converted to the accumulation dtype: exact on any device; used for fp64, fp32 and fp16."""

    operand: torch.dtype

    def logits(self, hidden_CH: Tensor, weight_VH: Tensor, out_CV: Tensor) -> None:
        """Run GEMM 1."""
        torch.mm(hidden_CH.to(self.operand), weight_VH.T, out=out_CV)

    def add_dweight(self, draw_CV: Tensor, hidden_CH: Tensor, dweight_VH: Tensor) -> None:
        """Run GEMM 3."""
        hidden_CH = hidden_CH.to(self.operand)
        if dweight_VH.dtype == self.operand:
            torch.addmm(dweight_VH, draw_CV.T, hidden_CH, out=dweight_VH)
        else:
            dweight_VH += draw_CV.T @ hidden_CH

    def set_dweight(self, draw_CV: Tensor, hidden_CH: Tensor, dweight_VH: Tensor) -> None:
        """Run GEMM 3 with beta = 0: dweight_VH may hold anything."""
        hidden_CH = hidden_CH.to(self.operand)
        if dweight_VH.dtype == self.operand:
            torch.mm(draw_CV.T, hidden_CH, out=dweight_VH)
        else:
            dweight_VH.copy_(draw_CV.T @ hidden_CH)


@dataclass(frozen=True)
class WideOut:
    """GEMMs on bf16 tensor cores with an fp32 result: exact products, fp32 sums, the bf16 rate. CUDA only."""

    operand: torch.dtype = torch.bfloat16

    def logits(self, hidden_CH: Tensor, weight_VH: Tensor, out_CV: Tensor) -> None:
        """Run GEMM 1."""
        torch.mm(hidden_CH, weight_VH.T, out_dtype=torch.float32, out=out_CV)

    def add_dweight(self, draw_CV: Tensor, hidden_CH: Tensor, dweight_VH: Tensor) -> None:
        """Run GEMM 3."""
        if dweight_VH.dtype == torch.float32:
            torch.addmm(dweight_VH, draw_CV.T, hidden_CH, out_dtype=torch.float32, out=dweight_VH)
        else:
            torch.addmm(dweight_VH, draw_CV.T, hidden_CH, out=dweight_VH)


@dataclass(frozen=True)
class Residual:
    """GEMMs on bf16 CPU instructions (AVX-512 BF16, AMX), which write bf16 only: a second GEMM adds the rounding error.

    z1 = bf16(h W^T), then z2 = bf16(h W^T - z1), subtracted before rounding. z1 + z2 is within 2^-17 |z| of h W^T,
    against 2^-9 |z| for z1 alone. Both GEMMs together take less time than one in fp32.
    """

    operand: torch.dtype = torch.bfloat16

    def logits(self, hidden_CH: Tensor, weight_VH: Tensor, out_CV: Tensor) -> None:
        """Run GEMM 1 twice."""
        high_CV = torch.mm(hidden_CH, weight_VH.T)
        out_CV.copy_(high_CV)
        out_CV += torch.addmm(high_CV, hidden_CH, weight_VH.T, beta=-1, out=high_CV)

    def add_dweight(self, draw_CV: Tensor, hidden_CH: Tensor, dweight_VH: Tensor) -> None:
        """Run GEMM 3. Each chunk's part is rounded to bf16; the sum of the parts is not."""
        if dweight_VH.dtype == self.operand:
            torch.addmm(dweight_VH, draw_CV.T, hidden_CH, out=dweight_VH)
        else:
            dweight_VH += draw_CV.T @ hidden_CH


@dataclass(frozen=True)
class HostWideOut:
    """GEMMs on AMX. GEMMs 1 and 3 have an fp32 result: exact products, fp32 sums, no second GEMM."""

    operand: torch.dtype = torch.bfloat16

    def logits(self, hidden_CH: Tensor, weight_VH: Tensor, out_CV: Tensor) -> None:
        """Run GEMM 1."""
        host.add_product(out_CV, hidden_CH, weight_VH.T, beta=0.0)

    def add_dweight(self, draw_CV: Tensor, hidden_CH: Tensor, dweight_VH: Tensor) -> None:
        """Run GEMM 3."""
        if dweight_VH.dtype == torch.float32:
            host.add_product(dweight_VH, draw_CV.T, hidden_CH, beta=1.0)
        else:
            torch.addmm(dweight_VH, draw_CV.T, hidden_CH, out=dweight_VH)

    def set_dweight(self, draw_CV: Tensor, hidden_CH: Tensor, dweight_VH: Tensor) -> None:
        """Run GEMM 3 with beta = 0: dweight_VH may hold anything."""
        if dweight_VH.dtype == torch.float32:
            host.add_product(dweight_VH, draw_CV.T, hidden_CH, beta=0.0)
        else:
            torch.mm(draw_CV.T, hidden_CH, out=dweight_VH)


Gemms = Upcast | WideOut | Residual | HostWideOut


def zero_behind_rows(matrix_CV: Tensor) -> None:
    """Zero the elements behind each row of a bf16 view of wider rows, before a CPU GEMM reads the view.

    AMX instructions take 32 elements at a time. oneDNN reads past the end of a row and multiplies those elements by
    zero. The bits of an overwritten logit may read as NaN there, and NaN * 0 is NaN.
    """
    rows, columns = matrix_CV.shape
    behind = min(matrix_CV.stride(0) - columns, 31)
    if matrix_CV.device.type == "cpu" and matrix_CV.dtype == torch.bfloat16 and behind > 0:
        start = matrix_CV.storage_offset() + columns
        matrix_CV.as_strided((rows, behind), matrix_CV.stride(), start).zero_()


def choose(weight_VH: Tensor, num_rows: int) -> Gemms:
    """Return the fastest exact GEMMs for a weight [V, H] and the number of rows of the whole call."""
    if weight_VH.dtype == torch.bfloat16:
        if weight_VH.is_cuda:
            return WideOut()
        wanted, pays = cpu_gemms(), num_rows * weight_VH.numel() >= _BF16_CPU_WORK
        if wanted != "fp32" and _has_bf16_cpu() and (pays or wanted == "bf16"):
            return HostWideOut() if host.has_wide_product() else Residual()
    return Upcast(torch.float64 if weight_VH.dtype == torch.float64 else torch.float32)


def _has_bf16_cpu() -> bool:
    # Private names of torch. A version without them uses Upcast.
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe is not None and probe() for probe in probes)
