"""`[model.lora]`: low-rank adapters beside frozen weights."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from or1.config.section import Section

ALL_LINEAR = "all-linear"
"""The target that stands for every linear layer of the decoder's layers."""
_OUTSIDE = ("lm_head", "embed_tokens", "wte", "embed_out", "embed_in", "output")


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _targets(value: tuple[str, ...]) -> tuple[str, ...]:
    refused = [name for name in value if name.rpartition(".")[2] in _OUTSIDE]
    if refused:
        reason = (
            f"{refused[0]} is refused as a target. An adapter on the head brings back the third product of the head "
            "and a gradient of vocabulary times hidden size; one on the embedding unties a tied head. Name layers of "
            f'the decoder, or "{ALL_LINEAR}"'
        )
        raise PydanticCustomError("targets", "{reason}", {"reason": reason})
    if not value or not all(name and all(part.isidentifier() for part in name.split(".")) for name in _plain(value)):
        raise PydanticCustomError(
            "targets", 'each target must be the name of a layer such as q_proj, or "all-linear"; name at least one'
        )
    if ALL_LINEAR in value and len(value) > 1:
        raise PydanticCustomError("targets", '"all-linear" stands for every layer; name it alone')
    return value


def _plain(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name != ALL_LINEAR]


def _no_dropout(value: float) -> float:
    if value != 0:
        raise PydanticCustomError(
            "dropout",
            "only 0 is possible: with dropout the trained policy is not the policy that sampled, and every ratio is "
            "wrong; remove it",
        )
    return value


_AS_LIST = BeforeValidator(_listed, json_schema_input_type=str | tuple[str, ...])


class LoraConfig(Section):
    """`[model.lora]`: train adapters beside frozen weights (docs/lora.md). Absent: all weights are trained."""

    rank: int = Field(32, ge=1, le=4096)
    """Rank of the adapters. Each target of shape [out, in] gets rank * (in + out) parameters."""
    alpha: float = Field(32.0, gt=0, le=1e6)
    """The adapter's product is multiplied by alpha / rank, or by alpha / sqrt(rank) with `rslora`."""
    targets: Annotated[tuple[str, ...], _AS_LIST, AfterValidator(_targets), Field(max_length=64)] = (ALL_LINEAR,)
    """Names of the linear layers that get an adapter, such as ["q_proj", "v_proj"]. all-linear: every one of the
    decoder's layers. Head and embedding are refused."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), so that the size of an update does not shrink with the rank (arXiv 2312.03732)."""
    dropout: Annotated[float, Field(ge=0, le=1), AfterValidator(_no_dropout)] = 0.0
    """Dropout before the adapters; only 0, because the trained policy must be the policy that sampled."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the adapters' first factors. The second factors start at 0, so the first policy is the base model."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: keep the frozen linear layers in 4 bits (QLoRA, bitsandbytes); needs one GPU."""
    push: Literal["merged", "adapter"] = "merged"
    """Weights that vLLM gets after an update. merged: base plus adapter, tensor by tensor. adapter: the adapter alone,
    a few megabytes; needs vLLM inside the trainer (placement = "colocate"). hf needs no push."""

    @property
    def scale(self) -> float:
        """Factor of the adapters' product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
