"""Memory savings for long rows: activation checkpointing, offload to host memory, tiled MLPs, Liger kernels."""

# T packed tokens, H hidden

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from or1.core.errors import MemoryOptionError
from or1.model.host_copies import Shelf, shelf_of
from or1.model.selective import selective_checkpoint


def checkpointing_mode(wanted: str, device: torch.device) -> str:
    """Return "none", "layer", "selective" or "offload" for the setting `model.gradient_checkpointing`."""
    if wanted != "auto":
        return wanted
    return "selective" if device.type == "cuda" else "none"


def checkpoint_layers(model: PreTrainedModel, mode: str, shelf: Shelf | None = None) -> None:
    """Save only the input of each layer and recompute its activations in backward.

    mode   "layer"; "selective" also keeps the outputs of attention; "offload" keeps the inputs in host memory
    shelf  where "offload" keeps them; None: the shelf of the GPU, and no copies on a CPU

    Raises MemoryOptionError for a model that transformers cannot checkpoint.
    """
    if not model.supports_gradient_checkpointing:
        raise MemoryOptionError(
            f'{type(model).__name__} cannot be checkpointed by transformers; set model.gradient_checkpointing = "none"'
        )
    # transformers 5.23 renames the method and deprecates the old name; older versions have only the old name.
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if mode == "layer":
        return
    function = selective_checkpoint if mode == "selective" else functools.partial(_offloaded_checkpoint, shelf)
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            # Not by assignment: torch's types allow only tensors and modules as attributes of a module.
            vars(module)["_gradient_checkpointing_func"] = function


def _offloaded_checkpoint(shelf: Shelf | None, function: Callable, *args: object) -> object:
    # torch saves the inputs of a checkpoint as saved tensors of the outer graph, so the hooks apply to the inputs only.
    with _host_copies(shelf, args):
        return checkpoint(function, *args, use_reentrant=False)


def _host_copies(shelf: Shelf | None, args: tuple[object, ...]) -> AbstractContextManager:
    if shelf is None:
        device = next((a.device for a in args if isinstance(a, Tensor) and a.is_cuda), None)
        if device is None:
            return nullcontext()
        shelf = shelf_of(device)
    return torch.autograd.graph.saved_tensors_hooks(shelf.put, shelf.take)


def tile_mlps(model: PreTrainedModel, tile_tokens: int) -> int:
    """Make every gated MLP process rows longer than `tile_tokens` in tiles; return the number of such MLPs.

    Outputs and gradients are those of the whole row. Backward recomputes one tile at a time, so the intermediate
    activations of an MLP exist for one tile only.
    """
    parts = ("gate_proj", "up_proj", "down_proj")
    # Not experts and routers, whose submodules have other names: their outputs depend on other tokens of the row.
    modules = [m for m in model.modules() if all(isinstance(getattr(m, part, None), nn.Linear) for part in parts)]
    for module in modules:
        whole = module.forward

        def tiled(x: Tensor, whole: Callable[[Tensor], Tensor] = whole, module: nn.Module = module) -> Tensor:
            if x.shape[-2] <= tile_tokens:
                return whole(x)
            return tiled_forward(whole, x, tile_tokens, tuple(p for p in module.parameters() if p.requires_grad))

        module.forward = tiled
    return len(modules)


def tiled_forward(
    function: Callable[[Tensor], Tensor], x: Tensor, tile_tokens: int, params: tuple[nn.Parameter, ...]
) -> Tensor:
    """Return `function(x)` computed in tiles of tokens; x and the result are float[..., T, H].

    function  must treat every token independently
    params    parameters that `function` reads and that need a gradient
    """
    if not torch.is_grad_enabled():
        return torch.cat([function(tile) for tile in x.split(tile_tokens, dim=-2)], dim=-2)
    # A separate node saves x. In a checkpointed layer, recomputation stops at the last tensor that backward needs. That
    # tensor is then x, so the recomputation skips the tiles, which backward would compute again anyway.
    token = _Keep.apply(x, torch.zeros((), device=x.device, requires_grad=True))
    return _Tiled.apply(x, token, function, tile_tokens, *params)


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor):
        ctx.save_for_backward(x)
        return anchor.clone()

    @staticmethod
    def backward(ctx, _):
        return None, None


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token, function, tile_tokens, *params):
        ctx.kept, ctx.function, ctx.tile_tokens, ctx.params = token.grad_fn, function, tile_tokens, params
        ctx.x_needs_grad = ctx.needs_input_grad[0]
        return torch.cat([function(tile) for tile in x.split(tile_tokens, dim=-2)], dim=-2)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.kept.saved_tensors
        dtypes = [torch.promote_types(p.dtype, torch.float32) for p in ctx.params]
        # fp32: 16-bit sums over many tiles would be less accurate than one matrix product over the row.
        sums = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(ctx.params, dtypes, strict=True)]
        dx = torch.empty_like(x)
        for x_tile, dy_tile, dx_tile in zip(*(t.split(ctx.tile_tokens, dim=-2) for t in (x, dy, dx)), strict=True):
            with torch.enable_grad():
                leaf = x_tile.detach().requires_grad_()
                y_tile = ctx.function(leaf)
            grads = torch.autograd.grad(y_tile, (leaf, *ctx.params), dy_tile)
            dx_tile.copy_(grads[0])
            for total, grad in zip(sums, grads[1:], strict=True):
                total.add_(grad)
        dparams = (total.to(p.dtype) for total, p in zip(sums, ctx.params, strict=True))
        return dx if ctx.x_needs_grad else None, None, None, None, *dparams


def apply_liger(model: PreTrainedModel, wanted: str, device: torch.device) -> bool:
    """Replace RMSNorm, RoPE and SwiGLU of `model` by Liger's kernels; return True if they were replaced.

    wanted  "on", "off" or "auto"

    Raises MemoryOptionError if `wanted` is "on" and the kernels cannot run.
    """
    if wanted == "off":
        return False
    why_not = _why_no_liger(model, device)
    if why_not:
        if wanted == "on":
            raise MemoryOptionError(f'model.liger = "on", but {why_not}; use "auto" or "off"')
        return False
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # No losses: or1 has its own head. RoPE is replaced in the architecture's module, for all models of this process.
    _apply_liger_kernel_to_instance(
        model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )
    return True


def _why_no_liger(model: PreTrainedModel, device: torch.device) -> str:
    if device.type != "cuda":
        return f"its kernels need a GPU and the model is on the {device.type}"
    if model.dtype == torch.float64:
        return "its kernels compute in fp32 and the model is fp64"
    if importlib.util.find_spec("liger_kernel") is None:
        return 'liger-kernel is not installed (pip install "or1[liger]")'
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    known = model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN
    return "" if known else f"it does not know the architecture {model.config.model_type!r}"
