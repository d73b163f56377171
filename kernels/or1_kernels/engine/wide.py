"""GEMMs of a chunk on a GPU: fp16 as well as bf16, no zero fill, fp32 partial sums; and chunk sizes by waves.

Legend: N rows, C rows of a chunk, H hidden, V vocab.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from . import gemms

_HALVES = (torch.bfloat16, torch.float16)
_FLAGS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
# Rows that a tile of cuBLAS's usual kernel has. Chunks are multiples of it.
_TILE_ROWS, _TILE_COLUMNS = 128, 256
_MOST_ROWS = {"fast": 8192, "lean": 1024}
_LEAST_ROWS = 1024
# The logits of a chunk take at most this part of the GPU's memory. The total counts and not the free memory: the size
# of a chunk decides the order of sums, and results must not depend on what else runs.
_MEMORY_PART = 16
# Predicted: multiplications and additions in the time in which one byte of dW is read or written behind a GEMM.
_FLOPS_A_BYTE = 90


@dataclass(frozen=True)
class Wide(gemms.WideOut):
    """WideOut whose first chunk writes dW instead of adding to zeros."""

    def wide_mm(self, draw_CV: Tensor, weight_VH: Tensor) -> Tensor:
        """Run GEMM 2 with an fp32 result."""
        return torch.mm(draw_CV, weight_VH, out_dtype=torch.float32)

    def set_dweight(self, draw_CV: Tensor, hidden_CH: Tensor, dweight_VH: Tensor) -> None:
        """Run GEMM 3 with beta = 0: dweight_VH may hold anything."""
        if dweight_VH.dtype == torch.float32:
            torch.mm(draw_CV.T, hidden_CH, out_dtype=torch.float32, out=dweight_VH)
        else:
            torch.mm(draw_CV.T, hidden_CH, out=dweight_VH)


def choose(weight_VH: Tensor, num_rows: int) -> gemms.Gemms:
    """Return Wide for bf16 and fp16 weights on a GPU, else what gemms.choose returns."""
    if weight_VH.is_cuda and weight_VH.dtype in _HALVES:
        return Wide(operand=weight_VH.dtype)
    return gemms.choose(weight_VH, num_rows)


@contextmanager
def fp32_sums() -> Iterator[None]:
    """Forbid cuBLAS to add partial sums in bf16 or fp16, as torch allows by default. Restores torch's switches."""
    matmul = torch.backends.cuda.matmul
    # Newer versions of torch keep a second switch beside each, and reset it unless both are given.
    before = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)) for name in _FLAGS}
    try:
        for name, (_, split) in before.items():
            setattr(matmul, name, False if split is None else (False, split))
        yield
    finally:
        for name, (reduced, split) in before.items():
            setattr(matmul, name, reduced if split is None else (reduced, split))


@cache
def _machine(device: torch.device) -> tuple[int, int]:
    """Return multiprocessors and bytes of memory of a GPU."""
    if not torch.cuda.is_available():
        return 132, 80 << 30  # A tensor without a device, in a rehearsal.
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.total_memory


def chunk_rows(num_rows: int, shape_VH: tuple[int, int], preset: str, device: torch.device) -> int:
    """Return the rows of a chunk: the predicted fastest multiple of 128.

    GEMM 2 runs in waves of one tile a multiprocessor, and a last wave costs as much as a full one. Every chunk also
    reads and writes dW once.
    """
    (vocab, width), (processors, memory) = shape_VH, _machine(device)
    most = max(_TILE_ROWS, _whole_tiles(min(_MOST_ROWS[preset], memory // _MEMORY_PART // (4 * vocab)), up=False))

    def cost(rows: int) -> int:
        waves = -(-(rows // _TILE_ROWS) * -(-width // _TILE_COLUMNS) // processors)
        chunk = waves * processors * _TILE_ROWS * _TILE_COLUMNS * 2 * vocab + 8 * vocab * width * _FLOPS_A_BYTE
        return chunk * -(-num_rows // rows)

    least = -(-num_rows // most)
    counts = range(least, max(least, num_rows // _LEAST_ROWS) + 1)
    sizes = [min(most, _whole_tiles(-(-num_rows // count))) for count in counts if count]
    return min(sizes, key=cost, default=most)


def _whole_tiles(rows: int, up: bool = True) -> int:
    return (-(-rows // _TILE_ROWS) if up else rows // _TILE_ROWS) * _TILE_ROWS


def unit_of(slopes: Tensor) -> Tensor:
    """Return the power of two above the largest slope, []: fp16 gradients in this unit neither vanish nor overflow."""
    largest = slopes.abs().max() if slopes.numel() else slopes.new_zeros(())
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    return torch.where((largest > 0) & unit.isfinite(), unit, 1.0)
