"""torch.compile of what lies between the matrix products of a layer: norms, gated MLPs, rotary embedding.

Each of these is one memory pass when compiled, and up to ten without. One compiled function serves all modules of a
class: its parameters are inputs, and lengths are dynamic, so rows and layers share the code. Attention and the layer
itself stay as they are, and with them checkpointing, packed rows, shared prompts, and every hook.
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from or1.core.errors import MemoryOptionError

_ROTARY = "apply_rotary_pos_emb"
_GATED = ("gate_proj", "up_proj", "down_proj")
_MARK = "_or1_compiled"


def compile_elementwise(model: PreTrainedModel, device: torch.device) -> int:
    """Compile norms, gated MLPs and rotary embedding of `model`; return the number of modules with compiled parts.

    Compilation itself happens at the first row. The rotary embedding is a function of the architecture's module, so it
    is replaced for all models of this process.

    Raises MemoryOptionError where nothing can be compiled.
    """
    if why_not := _why_not(device):
        raise MemoryOptionError(f"model.compile = true, but {why_not}; set model.compile = false")
    modules = [module for module in model.modules() if _is_norm(module) or _is_gated(module)]
    if not modules:
        raise MemoryOptionError(
            f"model.compile = true, but {model.config.model_type} has no norm and no gated MLP that or1 knows; "
            "set model.compile = false"
        )
    for module in modules:
        # Not by assignment to a method: torch's types allow only tensors and modules as attributes of a module.
        vars(module)["forward"] = functools.partial(_compiled(type(module).forward), module)
    _compile_rotary(model)
    return len(modules)


def _why_not(device: torch.device) -> str:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "torch.compile needs triton on this GPU (compute capability 7.0 or above)"
    if device.type != "cpu":
        return f"the model is on the {device.type}, and or1 compiles for CPUs and GPUs"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        found = shutil.which(get_cpp_compiler())
    # The kind depends on the version of torch.
    except (InvalidCxxCompiler, RuntimeError) as error:
        return f"torch.compile finds no C++ compiler (set CXX, or install g++): {error}"
    return "" if found else "torch.compile finds no C++ compiler (set CXX, or install g++)"


def _is_norm(module: nn.Module) -> bool:
    # A norm has no submodules. Norms of heads have them in no architecture either.
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and not any(module.children())


def _is_gated(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, part, None), nn.Linear) for part in _GATED)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # "auto" lengths would compile the first row for its own length, and a second time for any.
    return torch.compile(function, dynamic=True)


def uncompiled() -> AbstractContextManager[object]:
    """Return a context in which the compiled parts of all models run as they are."""
    # Asking torch imports its compiler, which takes seconds.
    return torch.compiler.set_stance("force_eager") if _compiled.cache_info().currsize else nullcontext()


def _compile_rotary(model: PreTrainedModel) -> None:
    for module in _modeling_modules(model):
        rotary = getattr(module, _ROTARY, None)
        if callable(rotary) and not hasattr(rotary, _MARK):
            compiled = functools.wraps(rotary)(_compiled(rotary))
            setattr(compiled, _MARK, True)
            setattr(module, _ROTARY, compiled)


def _modeling_modules(model: PreTrainedModel) -> list[ModuleType]:
    names = {type(module).__module__ for module in model.modules()}
    return [sys.modules[name] for name in sorted(names) if name.startswith("transformers.models.")]
