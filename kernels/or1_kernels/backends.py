"""Which implementation of the two row passes runs: chosen by name or by device, never stumbled into."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from . import native_rows, rows

_HAS_TRITON = find_spec("triton") is not None
IMPLS = ("auto", "triton", "native", "torch", "reference")


class Backend(NamedTuple):
    """The two passes of `rows`, and the name under which stats.impl reports them."""

    name: str
    row_sums: Callable[..., rows.RowSums]
    row_grads_: Callable[..., Tensor]


TORCH = Backend("torch", rows.row_sums, rows.row_grads_)
NATIVE = Backend("native", native_rows.row_sums, native_rows.row_grads_)


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for `impl`; "auto" takes the fastest one that can run: triton on a GPU, native on a CPU, else torch.

    Raises ValueError for an unknown name and RuntimeError for an explicit choice that cannot run here.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {IMPLS}")
    if impl == "torch":
        return TORCH
    if impl == "auto":
        if device.type == "cuda" and _why_not_triton(device, dtype) is None:
            return _triton()
        return TORCH if _why_not_native(device, dtype) else NATIVE
    why_not = _why_not_native(device, dtype) if impl == "native" else _why_not_triton(device, dtype)
    if why_not is not None:
        raise RuntimeError(f"impl={impl!r} cannot run: {why_not}; use impl='auto' to take what can")
    return NATIVE if impl == "native" else _triton()


def _triton() -> Backend:
    from . import score_rows

    return Backend("triton", score_rows.row_sums, score_rows.row_grads_)


def _why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    if not native_rows.AVAILABLE:
        return "the extension or1_kernels._native is not built (python setup.py build_ext --inplace)"
    if device.type != "cpu":
        return f"it is for the CPU and the tensors are on {device}"
    return _why_not_fp64(dtype)


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if device.type == "cpu":
        from . import score_rows

        if not score_rows.INTERPRETED:
            return "the tensors are on the CPU, where Triton only runs with TRITON_INTERPRET=1"
    return _why_not_fp64(dtype)


def _why_not_fp64(dtype: torch.dtype) -> str | None:
    return "it computes in fp32 and the tensors are fp64" if dtype == torch.float64 else None
