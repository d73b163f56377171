"""Engines that generate responses. or1/rollout/README.md explains the interface and how to add an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from or1.rollout.make import make_engine, serve

__all__ = ["make_engine", "serve"]


def __getattr__(name: str) -> Any:
    # Lazy: or1.rollout.make loads torch and transformers, and or1.rollout.vllm.setup is used without them.
    if name in __all__:
        from or1.rollout import make

        return getattr(make, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
