"""Choice of the row passes: by the name in `impl`, or by device and dtype.

Legend: C rows of a chunk, V vocab.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from . import native, plain
from .stats import PolicyDraw, RowStats, RowSums, TokenConstants, Transform

if TYPE_CHECKING:
    from ..engine.exp_gemm import ExpGemm

_HAS_TRITON = find_spec("triton") is not None
IMPLS = ("auto", "triton", "quack", "native", "torch", "reference")


class SumsPass(Protocol):
    """Pass 1; see plain.row_sums."""

    def __call__(self, logits_CV: Tensor, targets_C: Tensor, inv_tau_C: Tensor, transform: Transform, /) -> RowSums: ...


class GradsPass(Protocol):
    """Pass 2; see plain.row_grads_."""

    def __call__(
        self,
        logits_CV: Tensor,
        targets_C: Tensor,
        inv_tau_C: Tensor,
        transform: Transform,
        stats: RowStats,
        slopes: tuple[Tensor, Tensor],
        /,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor: ...


class PolicyPass(Protocol):
    """Both passes and the objective between them; see triton_policy.policy_rows_."""

    def __call__(
        self,
        logits_CV: Tensor,
        targets_C: Tensor,
        inv_tau_C: Tensor,
        transform: Transform,
        constants: TokenConstants,
        /,
        *,
        out_dtype: torch.dtype,
    ) -> PolicyDraw: ...


class Backend(NamedTuple):
    """Both passes of one implementation, and the name that stats.impl reports.

    policy_rows_  the passes and the objective in one call; None: the engine computes the objective between the passes
    exp_gemm      GEMM 1 with an epilogue that replaces the passes of a policy loss without a bonus
    """

    name: str
    row_sums: SumsPass
    row_grads_: GradsPass
    policy_rows_: PolicyPass | None = None
    exp_gemm: ExpGemm | None = None


TORCH = Backend("torch", plain.row_sums, plain.row_grads_)
NATIVE = Backend("native", native.row_sums, native.row_grads_)


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the backend for `impl`. "auto" prefers triton on a GPU and native on a CPU, and falls back to torch.

    Raises ValueError for an unknown name, and RuntimeError if an explicit choice cannot run on `device` with `dtype`.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {IMPLS}")
    if impl == "torch":
        return TORCH
    if impl == "auto":
        if device.type == "cuda" and _why_not_triton(device, dtype) is None:
            return _triton()
        return TORCH if _why_not_native(device, dtype) else NATIVE
    why_not = _WHY_NOT[impl](device, dtype)
    if why_not is not None:
        raise RuntimeError(f"impl={impl!r} cannot run: {why_not}; use impl='auto' to take what can")
    if impl == "quack":
        return _quack()
    return NATIVE if impl == "native" else _triton()


def _quack() -> Backend:
    from ..engine.quack_gemm import QuackGemm

    return _triton()._replace(name="quack", exp_gemm=QuackGemm())


def _triton() -> Backend:
    from . import triton_kernel, triton_policy

    return Backend("triton", triton_kernel.row_sums, triton_kernel.row_grads_, triton_policy.policy_rows_)


def _why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    if not native.AVAILABLE:
        return "the extension or1_kernels._native is not built (python setup.py build_ext --inplace)"
    if device.type != "cpu":
        return f"it is for the CPU and the tensors are on {device}"
    return _why_not_fp64(dtype)


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if device.type == "cpu":
        from . import triton_kernel

        if not triton_kernel.INTERPRETED:
            return "the tensors are on the CPU, where Triton only runs with TRITON_INTERPRET=1"
    return _why_not_fp64(dtype)


def _why_not_quack(device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec("quack") is None:
        return "the package quack-kernels is not installed (pip install 'or1[quack]')"
    if device.type != "cuda":
        return f"it is for Hopper and Blackwell GPUs and the tensors are on {device}"
    if dtype != torch.bfloat16:
        return f"it multiplies bfloat16 and the tensors are {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10):
        return f"it is for GPUs of compute capability 9.x and 10.x, and this one has {major}.{minor}"
    try:
        from ..engine import quack_gemm  # noqa: F401
    # A package that was built for another torch or CUDA raises more than ImportError.
    except Exception as error:  # noqa: BLE001
        return f"quack-kernels cannot be imported ({error}); or1 is tested with 0.6.5"
    return _why_not_triton(device, dtype)


def _why_not_fp64(dtype: torch.dtype) -> str | None:
    return "it computes in fp32 and the tensors are fp64" if dtype == torch.float64 else None


_WHY_NOT = {"native": _why_not_native, "triton": _why_not_triton, "quack": _why_not_quack}
