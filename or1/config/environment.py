"""`[environment]`: an environment of the package verifiers, instead of `[data]` and `[reward]`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from or1.config.section import MOST_SECONDS, Section


class EnvironmentConfig(Section):
    """`[environment]`: tasks and rewards of the package verifiers, instead of data.train and reward.kind."""

    id: str = ""
    """Taskset: an installed package, or a file such as "envs/adder.py". Empty: none, train on [data]."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Settings of verifiers' EnvConfig, such as {taskset = {split = "train"}, agent = {max_turns = 4}}."""
    renderer: dict[str, Any] = Field(default_factory=dict)
    """Settings of the package renderers, such as {name = "qwen3"}; empty: chosen by the model's name."""
    timeout_s: float = Field(300.0, gt=0, le=MOST_SECONDS)
    """Longest time in seconds that an episode may spend between two requests to the model, such as in a tool or in
    scoring; beyond it, the response counts as a timeout."""
