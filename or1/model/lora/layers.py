"""PEFT's LoRA layers in a model: their injection, and a switch that turns all of them off.

    y = W x + scale B A x       W frozen; A [R, in] and B [out, R] are trained

PEFT's layers replace the linear layers in place, so the model keeps its class and its forward. The factors are kept in
fp32 (fp64 for an fp64 model) beside a bf16 base: an update of a bf16 factor would be rounded away. They are multiplied
in the dtype of the model, like master weights.
"""

# T tokens, R rank

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from or1.config.lora import ALL_LINEAR, LoraConfig
from or1.core.errors import ModelError
from or1.dist.fsdp import decoder_layers

NAME = "default"
"""Name of the adapter in PEFT's layers."""
_SHOWN = 12


class _Factor(nn.Linear):
    """A factor of an adapter: kept in its own dtype, multiplied in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


def add_adapters(model: PreTrainedModel, config: LoraConfig, path: str) -> PreTrainedModel:
    """Freeze all weights, and put a trainable adapter on every target. Return the model.

    The first factors are random numbers of `config.seed`, the second are 0, so the model computes what it did before.

    Raises ModelError if PEFT is missing or a target is no linear layer of the decoder.
    """
    require_peft()
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        # An integer by PEFT's type, but only divided by the rank.
        lora_alpha=int(config.alpha) if config.alpha.is_integer() else config.alpha,
        target_modules=target_names(model, config, path),
        use_rslora=config.rslora,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=path,
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        peft.inject_adapter_in_model(settings, model, NAME)
    wide = torch.promote_types(model.dtype, torch.float32)
    for layer in _layers(model):
        layer.cast_input_dtype_enabled = False
        for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
            factor.__class__ = _Factor
            factor.to(wide).requires_grad_(True)
    # Not by assignment: torch's types allow only tensors and modules as attributes of a module.
    vars(model)["or1_adapter_settings"] = settings
    return model


def require_peft() -> None:
    """Raise ModelError unless PEFT is installed."""
    if importlib.util.find_spec("peft") is None:
        raise ModelError('[model.lora] needs PEFT; pip install "or1[lora]", or remove the section to train all weights')


def adapter_settings(model: nn.Module) -> Any:
    """Return the peft.LoraConfig of a model with adapters."""
    return vars(model)["or1_adapter_settings"]


def has_adapters(model: nn.Module) -> bool:
    """Return True if `add_adapters` has put adapters on the model."""
    return "or1_adapter_settings" in vars(model)


def target_names(model: PreTrainedModel, config: LoraConfig, path: str) -> list[str]:
    """Return the names of the layers that get an adapter, as PEFT matches them: by the end of the full name.

    Raises ModelError for a target that no linear layer of the decoder's layers has.
    """
    layers = decoder_layers(model)
    names = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    known = sorted({name.rpartition(".")[2] for name in names})
    if config.targets == (ALL_LINEAR,):
        return known
    missing = [t for t in config.targets if not any(f".{name}".endswith(f".{t}") for name in names)]
    if missing:
        more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
        raise ModelError(
            f"model.lora.targets names {missing[0]!r}, and no linear layer of {path!r} is called so; it has "
            f"{', '.join(known[:_SHOWN])}{more}"
        )
    return sorted(config.targets)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and module of every layer with an adapter."""
    return ((name, module) for name, module in model.named_modules() if _is_adapted(module))


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for _, module in adapted_layers(model))


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute with the frozen weights alone inside the block."""
    layers = list(_layers(model))
    # Not by PEFT's enable_adapters: it also changes requires_grad, which FSDP has recorded.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
