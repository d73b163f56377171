"""Online filter: a stage drops prompts that the previous stage always solved (Skywork-OR1 report, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from or1.core.types import Group, Prompt
from or1.reward.terms import RIGHT


@dataclass
class SolvedPrompts:
    """Record of solved prompts by prompt id, part of a run's state.

    always   for each prompt seen in the current stage, True if every response was correct (in all visits, or in the
             last one)
    dropped  prompts that an earlier stage always solved
    """

    stage: int = 0
    always: dict[str, bool] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def enter(self, stage: int) -> int:
        """Begin stage `stage` if it is later than the current one, and drop prompts that the current one always solved.

        Return the number of newly dropped prompts.
        """
        if stage <= self.stage:
            return 0
        solved = {name for name, always in self.always.items() if always}
        self.dropped |= solved
        self.stage, self.always = stage, {}
        return len(solved)

    def note(self, groups: Iterable[Group], visits: Literal["all", "last"] = "all") -> None:
        """Record the results of one step.

        visits  "last": only the last visit of a prompt counts. "all": one incorrect response in any visit counts
        """
        for group in groups:
            right = bool(group.rewards.min() >= RIGHT)
            before = visits == "last" or self.always.get(group.prompt.id, True)
            self.always[group.prompt.id] = before and right

    def mask(self, prompts: Sequence[Prompt]) -> np.ndarray | None:
        """Return bool[N], True for the dropped ones of `prompts`; None if no prompt is dropped."""
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
