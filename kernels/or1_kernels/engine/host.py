"""What torch's operators do not offer on a CPU: memory in huge pages, and bf16 products with an fp32 result.

The product is MKL's `cblas_gemm_bf16bf16f32`, which torch's x86 builds contain and export. On AMX, MKL multiplies bf16
exactly, sums in fp32 and adds to an fp32 matrix. No operator of torch 2.13 reaches the function, so ctypes does.
Legend: M, N, K sizes of a product [M, K] [K, N].
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Set to 1, this variable forbids the product, for tests and for comparisons.
FORBID = "OR1_NO_WIDE_PRODUCT"
# Above this size glibc always maps a block of its own, so advice on the block touches no other memory.
_OWN_MAPPING = 32 << 20
_HUGE_PAGE = 2 << 20
_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112
# Sizes of a call are 32-bit integers.
_INT_MAX = 2**31 - 1


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return torch.empty. A large tensor on a CPU gets huge pages where Linux grants them on request.

    Otherwise the first write to each 4 KiB page traps into the kernel. For a large matrix that costs as much time as a
    row pass over the matrix.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    size = out.numel() * out.element_size()
    if out.device.type == "cpu" and size >= _OWN_MAPPING and not _is_fake(out):
        _advise_huge_pages(out.data_ptr(), size)
    return out


def borrow(like: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised matrix on the CPU, in memory that an earlier call gave back if that is large enough.

    New memory costs a call several percent: the kernel, and below it a virtual machine's host, clears each page.
    """
    spare, numel = None if _is_fake(like) else _take_spare(), shape[0] * shape[1]
    if spare is not None and spare.dtype == dtype and spare.numel() >= numel:
        return spare[:numel].view(shape)
    return empty(shape, dtype, like.device)


def give_back(matrix: Tensor) -> None:
    """Keep the memory of a `borrow` for the next one, if nothing refers to the matrix any more. One block is kept."""
    # Memory of an inference tensor cannot be written outside of inference mode. Small blocks are malloc's to keep.
    block = matrix.untyped_storage()
    if matrix.device.type != "cpu" or _is_fake(matrix) or matrix.is_inference() or block.nbytes() < _OWN_MAPPING:
        return
    _spare[:] = [matrix.new_empty(0).set_(block)]


def free_spare() -> None:
    """Free the memory that `give_back` keeps."""
    _spare.clear()


_spare: list[Tensor] = []


def _take_spare() -> Tensor | None:
    try:
        return _spare.pop()
    except IndexError:  # None is kept, or another thread was faster.
        return None


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return torch.zeros in the memory of `empty`."""
    return empty(shape, dtype, device).zero_()


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype`, in the memory of `empty`; x itself if it has this dtype."""
    return x if x.dtype == dtype else empty(x.shape, dtype, x.device).copy_(x)


def is_one(factor: Tensor) -> bool:
    """Return True for 1 on a CPU. False on other devices, where the host would wait for the value."""
    return factor.device.type == "cpu" and not _is_fake(factor) and factor.item() == 1


def _is_fake(x: Tensor) -> bool:
    return isinstance(x, torch._subclasses.FakeTensor)


def _advise_huge_pages(address: int, size: int) -> None:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return
    start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    length = (address + size - start) // _HUGE_PAGE * _HUGE_PAGE
    # A kernel without huge pages refuses; the memory is then as before.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))


def add_product(out_MN: Tensor, left_MK: Tensor, right_KN: Tensor, beta: float) -> None:
    """Set f32 out = left @ right + beta * out for bf16 factors. Needs `has_wide_product`.

    Factors may be views of wider rows, or transposed; nothing outside a view is read. beta 0 ignores the old content.
    """
    (rows, depth), columns = left_MK.shape, right_KN.shape[1]
    if out_MN.shape != (rows, columns) or right_KN.shape[0] != depth:
        raise ValueError(f"out {tuple(out_MN.shape)} is not {tuple(left_MK.shape)} @ {tuple(right_KN.shape)}")
    if left_MK.dtype != torch.bfloat16 or right_KN.dtype != torch.bfloat16 or out_MN.dtype != torch.float32:
        raise TypeError(f"{left_MK.dtype} @ {right_KN.dtype} -> {out_MN.dtype} must be bfloat16, bfloat16 -> float32")
    if out_MN.stride(1) != 1 or out_MN.stride(0) < columns:
        raise ValueError(f"out has strides {out_MN.stride()}; its columns must be adjacent and its rows disjoint")
    if not rows or not columns:
        return
    if not depth:
        out_MN.mul_(beta)
        return
    (left, left_code, left_step), (right, right_code, right_step) = _factor(left_MK), _factor(right_KN)
    if max(rows, columns, depth, left_step, right_step, out_MN.stride(0)) > _INT_MAX:
        raise ValueError(f"a size or stride of {tuple(left_MK.shape)} @ {tuple(right_KN.shape)} exceeds {_INT_MAX}")
    gemm = _gemm()
    if gemm is None:
        raise RuntimeError("this build of torch has no cblas_gemm_bf16bf16f32; ask has_wide_product first")
    a, b, c = left.data_ptr(), right.data_ptr(), out_MN.data_ptr()
    sizes = (rows, columns, depth)
    gemm(_ROW_MAJOR, left_code, right_code, *sizes, 1.0, a, left_step, b, right_step, beta, c, out_MN.stride(0))


def _factor(matrix: Tensor) -> tuple[Tensor, int, int]:
    """Return a matrix that BLAS can read, its transposition code and the step between its rows."""
    rows, columns = matrix.shape
    if matrix.stride(1) == 1 and matrix.stride(0) >= columns:
        return matrix, _PLAIN, matrix.stride(0)
    if matrix.stride(0) == 1 and matrix.stride(1) >= rows:
        return matrix, _TRANSPOSED, matrix.stride(1)
    return matrix.contiguous(), _PLAIN, columns


def has_wide_product() -> bool:
    """Return True if `add_product` runs on AMX here, and OR1_NO_WIDE_PRODUCT does not forbid it."""
    if os.environ.get(FORBID, "") not in ("", "0"):
        return False
    # A private name of torch. A version without it has no wide product.
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and probe() and _gemm() is not None


@cache
def _gemm() -> Callable[..., None] | None:
    """Return MKL's function, or None if this build of torch lacks it or its result is not the expected one."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        gemm = ctypes.CDLL(str(path)).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    # 64-bit integers fit builds with 32-bit sizes too: x86-64 passes each in a register or a slot of 8 bytes.
    size, pointer, scalar = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    gemm.argtypes = [*[size] * 6, scalar, pointer, size, pointer, size, scalar, pointer, size]
    gemm.restype = None
    left, right = torch.arange(1, 7).view(2, 3), torch.arange(1, 13).view(4, 3)
    a, b, c = left.bfloat16(), right.bfloat16(), torch.ones(2, 4)
    gemm(_ROW_MAJOR, _PLAIN, _TRANSPOSED, 2, 4, 3, 1.0, a.data_ptr(), 3, b.data_ptr(), 3, 2.0, c.data_ptr(), 4)
    return gemm if torch.equal(c, (left @ right.T + 2).float()) else None


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad * factor in `dtype`, in place if no second backward can read `grad`, which saves a [V, H]."""
    if grad.dtype == dtype or grad.device.type == "cpu":
        if _graph_is_kept():
            return converted(grad * factor, dtype)
        return converted(grad if is_one(factor) else grad.mul_(factor), dtype)
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _graph_is_kept() -> bool:
    """Return True if the running backward has retain_graph, and also for a torch without this information."""
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return probe is None or probe()
