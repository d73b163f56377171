"""The online filter: a stage does not train on what the stage before solved every time (report, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from or1.core.types import Group, Prompt
from or1.reward.terms import RIGHT


@dataclass
class SolvedPrompts:
    """Part of a run's state, by prompt id.

    always   of the prompts seen in the present stage, whether every response was right, of all visits or of the last
    dropped  prompts that an earlier stage solved by every one of those responses
    """

    stage: int = 0
    always: dict[str, bool] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def enter(self, stage: int) -> int:
        """Begin stage `stage` if it is a later one: what the one before always solved is dropped. Returns how many."""
        if stage <= self.stage:
            return 0
        solved = {name for name, always in self.always.items() if always}
        self.dropped |= solved
        self.stage, self.always = stage, {}
        return len(solved)

    def note(self, groups: Iterable[Group], visits: Literal["all", "last"] = "all") -> None:
        """Remember what became of the prompts of a step.

        visits  "last": a prompt that was wrong in an earlier visit of the stage and is right since counts as solved
        """
        for group in groups:
            right = bool(group.rewards.min() >= RIGHT)
            before = visits == "last" or self.always.get(group.prompt.id, True)
            self.always[group.prompt.id] = before and right

    def mask(self, prompts: Sequence[Prompt]) -> np.ndarray | None:
        """bool[N], the dropped ones of `prompts`; None if there are none."""
        if not self.dropped:
            return None
        return np.fromiter((prompt.id in self.dropped for prompt in prompts), dtype=bool, count=len(prompts))

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint's manifest."""
        by_answer = {
            name: sorted(p for p, a in self.always.items() if a is right)
            for name, right in (("solved", True), ("unsolved", False))
        }
        return {"stage": self.stage, **by_answer, "dropped": sorted(self.dropped)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.always = dict.fromkeys(state["solved"], True) | dict.fromkeys(state["unsolved"], False)
        self.stage, self.dropped = state["stage"], set(state["dropped"])
