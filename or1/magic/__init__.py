"""MAGIC, the recipe of the Skywork-OR1 report, as functions without I/O. or1.magic.tensors has the public ones."""

from typing import Any

__all__ = [
    "EntropyController",
    "group_advantages",
    "has_advantage",
    "reject_zero_advantage",
    "rollout_entropy",
    "token_denominator",
]


def __getattr__(name: str) -> Any:
    # Imported at first use: the other modules of this package need no torch.
    if name in __all__:
        from or1.magic import tensors

        return getattr(tensors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
