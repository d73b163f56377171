"""Keyword options of every form of the head, and their translation into engine settings.

Legend: N rows, H hidden, V vocab.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch
from torch import Tensor

from . import checks
from .engine.chunked import PRESETS, RowInputs, Settings, compute_dtype
from .engine.vocab_parallel import VocabShard
from .rows import IMPLS, Transform, resolve


class HeadOptionsDict(TypedDict, total=False):
    """The fields of HeadOptions as keyword arguments, for `**options: Unpack[HeadOptionsDict]`."""

    temperature: float | Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    impl: str
    preset: str
    chunk_rows: int | None
    stash_bytes: int
    grad_row_eps: float | None
    main_grad: Tensor | None
    group: torch.distributed.ProcessGroup | None


@dataclass(frozen=True)
class HeadOptions:
    """Options of linear_logprob_entropy, linear_policy_loss and LMHead's scoring forms.

    Logits are softcap * tanh(logit_scale * (h W^T + bias) / softcap) / temperature.

    temperature   a float above 0, or f32[N], one value a row
    bias          [V] in the weight's dtype, differentiable; None: no bias
    softcap       above 0; None: no cap
    logit_scale   above 0
    impl          "auto", "triton", "quack", "native", "torch" or "reference"; an explicit choice that cannot run raises
    preset        "fast", or "lean": small chunks and dW accumulated in the weight's dtype, for least memory
    chunk_rows    rows a chunk; None: by preset and size
    stash_bytes   linear_logprob_entropy only: budget for raw logits kept for backward, 4 bytes each. Chunks beyond
                  the budget are recomputed with a fourth GEMM
    grad_row_eps  linear_policy_loss only: rows with |dloss/dlogp| (1 - p_y) + entropy_coef * entropy <= eps, before
                  token_weight, skip the two backward GEMMs; stats.left_out bounds the error. 0 drops only rows
                  without gradient. On a GPU the host waits once a chunk. None: every row is used
    main_grad     f32[V, H] (f64 for fp64), contiguous: the weight's gradient is added here instead of to
                  weight.grad. linear_policy_loss adds during the forward call, so the upstream gradient of its
                  loss must be 1
    group         ranks that hold the vocabulary in equal parts, in rank order (vocabulary parallelism). weight, bias
                  and main_grad are this rank's part, targets are global ids. Other inputs and all results are the
                  same on every rank

    Raises ValueError for a value outside these limits.
    """

    temperature: float | Tensor = 1.0
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    impl: str = "auto"
    preset: str = "fast"
    chunk_rows: int | None = None
    stash_bytes: int = 0
    grad_row_eps: float | None = None
    main_grad: Tensor | None = None
    group: torch.distributed.ProcessGroup | None = None

    def __post_init__(self) -> None:
        _require("impl", self.impl, self.impl in IMPLS, f"must be one of {IMPLS}")
        _require("preset", self.preset, self.preset in PRESETS, f"must be one of {PRESETS}")
        _require("softcap", self.softcap, self.softcap is None or self.softcap > 0, "must be above 0; None: no cap")
        _require("logit_scale", self.logit_scale, self.logit_scale > 0, "must be above 0; fold a sign into the weight")
        _require(
            "chunk_rows",
            self.chunk_rows,
            self.chunk_rows is None or self.chunk_rows >= 1,
            "must be at least 1; None: chosen by size",
        )
        _require("stash_bytes", self.stash_bytes, self.stash_bytes >= 0, "must be at least 0; 0 recomputes everything")
        _require(
            "grad_row_eps",
            self.grad_row_eps,
            self.grad_row_eps is None or self.grad_row_eps >= 0,
            "must be at least 0; None keeps every row",
        )
        if self.impl == "reference":
            for name in ("grad_row_eps", "main_grad", "group"):
                _require(name, "set", getattr(self, name) is None, "is not part of impl='reference'; use impl='torch'")

    def check(self, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> None:
        """Raise unless hidden, weight, targets, bias and main_grad fit each other; see checks.check_head."""
        world = 1 if self.group is None else torch.distributed.get_world_size(self.group)
        checks.check_head(hidden_NH, weight_VH, targets_N, self.bias, weight_VH.shape[0] * world)
        checks.check_main_grad(self.main_grad, weight_VH, compute_dtype(weight_VH.dtype))

    def transform(self) -> Transform:
        """Return the map from raw logits to z, without the temperature."""
        return Transform(self.logit_scale, self.softcap)

    def row_inputs(self, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> RowInputs:
        """Return hidden, targets relative to this rank's shard, and 1 / temperature of every row."""
        if self.group is not None:
            targets_N = VocabShard.of(self.group, weight_VH.shape[0]).local(targets_N)
        dtype = compute_dtype(hidden_NH.dtype)
        return RowInputs(hidden_NH, targets_N, checks.inverse_temperature(self.temperature, hidden_NH, dtype))

    def scalars(self) -> dict[str, float | int | str | None]:
        """Return the arguments of the operators in engine.compiled that are no tensors."""
        return {
            "scale": self.logit_scale,
            "softcap": self.softcap,
            "impl": self.impl,
            "preset": self.preset,
            "chunk_rows": self.chunk_rows,
        }

    def traceable(self) -> bool:
        """Return True if the operators of engine.compiled can express this call. They ignore stash_bytes."""
        return self.main_grad is None and self.group is None

    def settings(self, weight_VH: Tensor) -> Settings:
        """Return engine settings for this weight. Raises RuntimeError if impl cannot run on its device."""
        backend = resolve(self.impl, weight_VH.device, weight_VH.dtype)
        if backend.exp_gemm is not None and (why_not := backend.exp_gemm.why_not(weight_VH)):
            raise RuntimeError(f"impl={self.impl!r} cannot run: {why_not}; use impl='auto' to take what can")
        shard = None if self.group is None else VocabShard.of(self.group, weight_VH.shape[0])
        return Settings(
            transform=self.transform(),
            backend=backend,
            shard=shard,
            preset=self.preset,
            chunk_rows=self.chunk_rows,
            stash_bytes=self.stash_bytes,
        )


_NAMES = tuple(field.name for field in fields(HeadOptions))


def head_options(options: Mapping[str, Any]) -> HeadOptions:
    """Return HeadOptions from keyword arguments. Raises TypeError for an unknown name, with the nearest known one."""
    for name in options:
        if name not in _NAMES:
            raise TypeError(_unknown(name))
    return HeadOptions(**options)


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, _NAMES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{name!r} is not an option of the head; {hint}The options are: {', '.join(_NAMES)}"


def _require(name: str, value: object, ok: bool, rule: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}; it {rule}")
