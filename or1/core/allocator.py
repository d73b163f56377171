"""Settings of torch's GPU allocator, which the environment holds and torch reads once."""

from __future__ import annotations

import os
from collections.abc import Mapping

# torch reads the first; the second is its older name, which torch and vLLM still accept.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_SETTING = "expandable_segments:True"
_ours = False


def expand_segments() -> bool:
    """Let the allocator's segments grow, unless the user has set the allocator. Call before the first use of a GPU.

    Packed rows differ in length, and so do their activations. With segments of fixed size, a GPU that is nearly full
    then has free memory that no tensor fits into.

    Return True if the setting was made.
    """
    global _ours
    if any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return False
    os.environ[ALLOCATOR_VARIABLES[0]] = _SETTING
    _ours = True
    return True


def users_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the setting of `expand_segments`, for a process that is not the trainer's."""
    return {name: value for name, value in environment.items() if not (_ours and name == ALLOCATOR_VARIABLES[0])}
