"""What `[model.lora]` changes in a plan: which scalars are trained, and how the frozen ones are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from or1.config.lora import ALL_LINEAR, LoraConfig
from or1.plan.shapes import ModelShape

# bitsandbytes: 4 bits a weight, an 8-bit scale a block of 64, and an fp32 scale of 256 such scales.
_NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Adapters:
    """The adapters of a run.

    four_bit  whether the frozen linear layers are stored in 4 bits
    alone     whether the engine gets the adapter and not merged weights
    """

    rank: int
    targets: tuple[str, ...]
    four_bit: bool = False
    alone: bool = False

    @classmethod
    def of(cls, lora: LoraConfig | None) -> Adapters | None:
        """Return the adapters of `[model.lora]`, None without the section."""
        if lora is None:
            return None
        return cls(lora.rank, lora.targets, lora.quantize == "nf4", lora.push == "adapter")

    def layer_shapes(self, shape: ModelShape) -> Iterator[tuple[int, int]]:
        """Yield rows and columns of every weight of one layer that has an adapter."""
        for name, sides in shape.layer_tensors().items():
            if len(sides) == 2 and self._is_target(name.removesuffix(".weight")):
                yield sides[0], sides[1]

    def _is_target(self, name: str) -> bool:
        return self.targets == (ALL_LINEAR,) or any(t.rpartition(".")[2] == name for t in self.targets)

    def sizes(self, shape: ModelShape) -> Iterator[int]:
        """Yield the scalars of every factor of the model: [rank, columns] and [rows, rank]."""
        layer = [self.rank * side for rows, columns in self.layer_shapes(shape) for side in (columns, rows)]
        for _ in range(shape.layers):
            yield from layer

    def saved_per_token(self, shape: ModelShape) -> int:
        """Return the scalars that the adapters of a layer save for each token: the product of the first factor."""
        return self.rank * len(list(self.layer_shapes(shape)))

    def frozen_bytes(self, shape: ModelShape, weight: int) -> int:
        """Return the bytes of the frozen weights; weight: bytes of a scalar that is not in 4 bits."""
        if not self.four_bit:
            return shape.parameters * weight
        linear = shape.layers * sum(prod(sides) for sides in shape.layer_tensors().values() if len(sides) == 2)
        return int(linear * _NF4_BYTES) + (shape.parameters - linear) * weight
