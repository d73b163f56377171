"""Problems: files -> prompts, which of them a run trains on, and in what order."""

from __future__ import annotations

from or1.data.difficulty import DifficultyFilter
from or1.data.load import BadRow, FileReport, PromptSet, load_prompts
from or1.data.rows import DataError
from or1.data.sampler import Pool, Sampler, SamplerState

__all__ = [
    "BadRow",
    "DataError",
    "DifficultyFilter",
    "FileReport",
    "Pool",
    "PromptSet",
    "Sampler",
    "SamplerState",
    "load_prompts",
]
