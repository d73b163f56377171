"""Weights of a model with adapters as those of a plain model: base + scale B A, one tensor at a time.

names in the model                                     plain name
...q_proj.base_layer.weight                            ...q_proj.weight      merged
...q_proj.base_layer.bias                              ...q_proj.bias
...q_proj.lora_A.default.weight, lora_B...             none
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from or1.model.lora.layers import NAME, adapted_layers

_FACTOR = re.compile(r"\.lora_[AB]\.")
# bitsandbytes adds these to a state dict: weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4.
_QUANTIZATION = re.compile(r"\.weight\.(absmax|quant_map|nested_|quant_state)")


def plain_name(name: str) -> str | None:
    """Return the name that a tensor of a model's state has without adapters; None if it is part of an adapter."""
    if _FACTOR.search(name) or _QUANTIZATION.search(name):
        return None
    return name.replace(".base_layer.", ".")


@dataclass(frozen=True)
class Adapted:
    """The adapter of one layer: A [R, in] and B [out, R], and the scale of their product."""

    layer: Any

    @property
    def shape(self) -> torch.Size:
        """Shape of the layer's weight, [out, in]. A 4-bit weight is stored in another shape."""
        return torch.Size((self.layer.out_features, self.layer.in_features))

    def merged(self, weight: Tensor, dtype: torch.dtype, whole: Callable[[Tensor], Tensor]) -> Tensor:
        """Return weight + scale B A, [out, in] in `dtype`, summed in fp32 or wider. Collective if sharded.

        weight  of the base layer, unsharded; may be in 4 bits
        whole   returns an unsharded tensor
        """
        a, b = whole(self.layer.lora_A[NAME].weight), whole(self.layer.lora_B[NAME].weight)
        base = dequantized(weight).detach().to(a.dtype)
        return torch.addmm(base, b.detach(), a.detach(), alpha=self.layer.scaling[NAME]).to(dtype)


def adapted_weights(model: nn.Module) -> dict[str, Adapted]:
    """Return the adapters by the plain names of the weights that they change."""
    return {f"{name}.weight": Adapted(module) for name, module in adapted_layers(model)}


def dequantized(weight: Tensor) -> Tensor:
    """Return the floating-point values of a weight of bitsandbytes; any other weight unchanged."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(weight.data, state)
    return values
