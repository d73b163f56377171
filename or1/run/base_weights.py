"""The base weights of a run with `[model.lora]`, whose checkpoints hold the adapters alone."""

from __future__ import annotations

from collections.abc import Mapping

from or1.config import Config
from or1.core.errors import RunError
from or1.dist.world import SINGLE, World

BASE = "the base weights"
"""Name of their fingerprint among the inputs of a run."""


def base_input(config: Config, world: World = SINGLE) -> dict[str, str]:
    """Return the fingerprint of the base weights by its name; nothing if all weights are trained. Collective."""
    if config.model.lora is None:
        return {}
    from or1.model.lora.base import base_fingerprint

    # The main rank has read the weights; other machines may not have the files.
    found = base_fingerprint(config.model.path) if world.is_main else ""
    return {BASE: world.from_main(found.encode()).decode()}


def require_base(recorded: Mapping[str, str], found: Mapping[str, str], path: str) -> None:
    """Raise RunError if a checkpoint's adapters were trained on other weights than those at `path`.

    recorded, found  inputs by name, of the checkpoint and of this start
    """
    if BASE in found and recorded.get(BASE, found[BASE]) != found[BASE]:
        raise RunError(
            f"the weights in {path} are not those that the adapters of this run were trained on (fingerprint "
            f"{found[BASE][:12]}, the checkpoint has {recorded[BASE][:12]}), and the checkpoint holds adapters alone. "
            "Put the original weights back, or start anew with --fresh"
        )
