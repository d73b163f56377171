"""The one place where a choice takes effect."""

from __future__ import annotations

import torch

from or1.config import ModelConfig
from or1.tune.choice import Choice
from or1_kernels.engine.preference import prefer_cpu_gemms
from or1_kernels.options import HeadOptionsDict


def is_open(model: ModelConfig, name: str) -> bool:
    """Return whether a value of a choice is left to the measurement: no explicit setting decides it."""
    value = getattr(model, name, "auto")
    # 0 rows mean "by size", but 0 tokens of an MLP tile are explicit: no tiles.
    return value == "auto" or (name == "head_chunk_rows" and value == 0)


def settled(model: ModelConfig, choice: Choice) -> ModelConfig:
    """Return `[model]` with the choice in place of every setting that is "auto" (or 0 rows); set the rest for torch.

    An explicit setting is never replaced. Raises ValueError for a choice that the settings do not allow.
    """
    settings = {name: value for name, value in choice.values().items() if name in ModelConfig.model_fields}
    changes = {name: value for name, value in settings.items() if is_open(model, name)}
    # Validated: the choice may come from a file.
    model = ModelConfig.model_validate(model.model_dump() | changes)
    if choice.threads is not None:
        torch.set_num_threads(choice.threads)
    if choice.cpu_gemms is not None:
        prefer_cpu_gemms(choice.cpu_gemms)
    return model


def head_options(model: ModelConfig) -> HeadOptionsDict:
    """Return the options of the head for settled settings."""
    preset = "fast" if model.head_preset == "auto" else model.head_preset
    return {
        "impl": model.head_impl,
        "preset": preset,
        "chunk_rows": model.head_chunk_rows or None,
        "stash_bytes": model.head_stash_mib << 20,
    }
