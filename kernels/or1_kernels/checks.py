"""Argument checks of the public functions. Every error names the argument, its value, the limit and the remedy.

Legend: N rows, H hidden, V vocab.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_head(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, bias_V: Tensor | None, vocab: int) -> None:
    """Raise TypeError for dtypes, ValueError for shapes and devices, IndexError for a CPU target outside [0, vocab)."""
    if hidden_NH.dim() != 2 or weight_VH.dim() != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden is {tuple(hidden_NH.shape)} and weight {tuple(weight_VH.shape)}; they must be [N, H] "
            "and [V, H] with one H; flatten leading dimensions first"
        )
    if hidden_NH.dtype not in _FLOATS:
        raise TypeError(f"hidden is {hidden_NH.dtype}; it must be one of {_FLOATS}")
    if weight_VH.dtype != hidden_NH.dtype:
        raise TypeError(
            f"hidden is {hidden_NH.dtype} but weight is {weight_VH.dtype}; cast one to the other "
            "(under mixed precision cast hidden: logits are fp32 in either case)"
        )
    if targets_N.dtype != torch.int64 or targets_N.shape != hidden_NH.shape[:1]:
        raise ValueError(
            f"targets are {targets_N.dtype}{list(targets_N.shape)}; they must be "
            f"torch.int64[{hidden_NH.shape[0]}], one token id a row of hidden"
        )
    if bias_V is not None and (bias_V.shape != weight_VH.shape[:1] or bias_V.dtype != weight_VH.dtype):
        raise ValueError(
            f"bias is {bias_V.dtype}{list(bias_V.shape)}; it must be "
            f"{weight_VH.dtype}[{weight_VH.shape[0]}] like the weight's rows"
        )
    for name, tensor in (("weight", weight_VH), ("targets", targets_N), ("bias", bias_V)):
        if tensor is not None and tensor.device != hidden_NH.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden_NH.device}; move it there")
    # On a GPU this check would make the host wait; under torch.compile it would break the graph. There the caller must
    # rule out ids outside the vocabulary.
    if targets_N.device.type == "cpu" and not torch.compiler.is_compiling() and targets_N.numel():
        low, high = int(targets_N.min()), int(targets_N.max())
        if low < 0 or high >= vocab:
            raise IndexError(
                f"targets span [{low}, {high}]; ids must lie in [0, {vocab}); drop masked "
                "rows before the call, or give them any id and token_weight 0"
            )


def as_constant(name: str, value_N: Tensor, like_N: Tensor) -> Tensor:
    """Return a per-row argument detached, with like_N's dtype and device. Raises ValueError unless floating [N]."""
    if value_N.shape != like_N.shape or not value_N.is_floating_point():
        raise ValueError(
            f"{name} is {value_N.dtype}{list(value_N.shape)}; it must be a floating tensor of shape "
            f"{list(like_N.shape)}, one value a row of hidden"
        )
    return value_N.detach().to(like_N.device, like_N.dtype)


def as_constants(given: Mapping[str, Tensor | None], like_N: Tensor) -> dict[str, Tensor]:
    """Return the arguments that are given, each as `as_constant` returns it. Raises ValueError as it does."""
    return {name: as_constant(name, value_N, like_N) for name, value_N in given.items() if value_N is not None}


def sequences(given_N: Tensor | None, token_weight_N: Tensor) -> Tensor | None:
    """Return the sequence of each row, -1 where token_weight is 0. Raises ValueError unless i64[N] or None."""
    if given_N is None:
        return None
    if given_N.dtype != torch.int64 or given_N.shape != token_weight_N.shape:
        raise ValueError(
            f"sequences are {given_N.dtype}{list(given_N.shape)}; they must be "
            f"torch.int64{list(token_weight_N.shape)}, the number of each row's sequence"
        )
    return torch.where(token_weight_N == 0, -1, given_N.to(token_weight_N.device))


def inverse_temperature(temperature: float | Tensor, like_NH: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 / temperature as a [N] tensor of `dtype`. Raises ValueError for a float <= 0 or a tensor not [N]."""
    num_rows = like_NH.shape[0]
    if isinstance(temperature, Tensor):
        like_N = torch.empty(num_rows, dtype=dtype, device=like_NH.device)
        return as_constant("temperature", temperature, like_N).reciprocal()
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0 (greedy decoding has no log-probs)")
    return torch.full((num_rows,), 1.0 / temperature, dtype=dtype, device=like_NH.device)


def check_main_grad(main_grad_VH: Tensor | None, weight_VH: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless main_grad is None or a contiguous accumulator of the weight's shape."""
    if main_grad_VH is None:
        return
    if main_grad_VH.shape != weight_VH.shape or main_grad_VH.dtype != dtype or not main_grad_VH.is_contiguous():
        raise ValueError(
            f"main_grad is {main_grad_VH.dtype}{list(main_grad_VH.shape)}; it must be a contiguous "
            f"{dtype}{list(weight_VH.shape)} like the weight"
        )
