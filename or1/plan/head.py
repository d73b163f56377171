"""Buffers of the fused LM head (or1_kernels.engine.chunked), in bytes.

The chunk sizes repeat those of or1_kernels.chunked, because importing that module would load torch.
tests/plan/test_memory.py compares the two.
"""

# N trained tokens of a row, C rows of a chunk, H hidden, V vocab

from __future__ import annotations

from dataclasses import dataclass

from or1.plan.choices import Choices
from or1.plan.devices import Device
from or1.plan.shapes import ModelShape

_GPU_MOST_ROWS, _GPU_TILE_ROWS, _GPU_MEMORY_PART = 8192, 128, 16
_CPU_BUFFER_BYTES, _CPU_MIN_CHUNK = 128 << 20, 256


@dataclass(frozen=True)
class HeadBuffers:
    """Bytes of buffers in three phases.

    forward   while loss and gradients are computed
    kept      from forward until the head's backward
    backward  while the gradient of the weight is converted to the dtype of the weight
    """

    forward: int
    kept: int
    backward: int


def chunk_rows(vocab: int, rows: int, arithmetic: int, gpu_memory: int | None) -> int:
    """Return the rows of the largest chunk; gpu_memory: bytes of the GPU, None on a CPU.

    On a GPU this is an upper bound: the head may choose fewer, to fill the waves of its GEMMs.
    """
    if gpu_memory is None:
        aim = max(_CPU_MIN_CHUNK, _CPU_BUFFER_BYTES // (vocab * arithmetic))
        return -(-rows // -(-rows // aim))
    fitting = gpu_memory // _GPU_MEMORY_PART // (arithmetic * vocab) // _GPU_TILE_ROWS * _GPU_TILE_ROWS
    return min(rows, max(_GPU_TILE_ROWS, min(_GPU_MOST_ROWS, fitting)))


def head_buffers(shape: ModelShape, choices: Choices, device: Device, rows: int) -> HeadBuffers:
    """Return the buffers for `rows` trained tokens: one chunk of fp32 logits, the gradients of states and weight."""
    v, h, e, a = shape.vocab, shape.hidden, choices.weight, choices.arithmetic
    logits = chunk_rows(v, rows, a, device.memory if device.is_gpu else None) * v * a
    wide = e == 2 and not device.is_gpu
    # The tensor cores of a GPU read bf16; a CPU may need an upcast copy of the weight.
    operand = a if wide else e
    upcast = v * h * a if wide else 0
    # A frozen head has no gradient, so the third GEMM and its sum are left out.
    frozen = choices.adapters is not None
    picked, dhidden, dweight = rows * h * e, rows * h * operand, 0 if frozen else v * h * a
    kept = picked + dhidden + dweight
    converted = 0 if frozen else v * h * e
    return HeadBuffers(forward=kept + logits + upcast, kept=kept, backward=kept + rows * h * e + converted)
