"""Data: files to prompts, the choice of prompts for training, and their order."""

from __future__ import annotations

from or1.core.errors import DataError
from or1.data.difficulty import DifficultyFilter, times_solved
from or1.data.duplicates import duplicate_lines
from or1.data.load import BadRow, FileReport, PromptSet, load_prompts
from or1.data.problems import Problems, load_eval_sets, load_problems, load_training_files
from or1.data.sampler import Pool, Sampler, SamplerState
from or1.data.shown import prompt_lines
from or1.data.solved import SolvedPrompts

__all__ = [
    "BadRow",
    "DataError",
    "DifficultyFilter",
    "FileReport",
    "Pool",
    "Problems",
    "PromptSet",
    "Sampler",
    "SamplerState",
    "SolvedPrompts",
    "duplicate_lines",
    "load_eval_sets",
    "load_problems",
    "load_prompts",
    "load_training_files",
    "prompt_lines",
    "times_solved",
]
