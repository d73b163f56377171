"""Record of the problems of a run whose gold answers the verifier cannot read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from or1.core.types import Group
from or1.reward.terms import unverifiable_groups

_SHOWN = 20
"""Problems that one warning names."""
_SHOWN_CHARS = 60
"""Characters of a gold answer in a warning."""


@dataclass
class UnverifiableRows:
    """The problems that were met so far, part of a run's state.

    ids  ids of the prompts
    """

    ids: set[str] = field(default_factory=set)

    def note(self, groups: Iterable[Group]) -> str:
        """Record the problems of one step. Return a warning that names those met for the first time, else ""."""
        found = {group.prompt.id: group.prompt.golds for group in unverifiable_groups(groups)}
        new = [name for name in sorted(found) if name not in self.ids]
        self.ids.update(new)
        if not new:
            return ""
        shown = [f"{name} {' or '.join(found[name])[:_SHOWN_CHARS]!r}" for name in new[:_SHOWN]]
        more = f" and {len(new) - _SHOWN} more" if len(new) > _SHOWN else ""
        return f"{unverifiable_text(len(new))}: {', '.join(shown)}{more}"

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint's manifest."""
        return {"ids": sorted(self.ids)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.ids = set(state["ids"])


def unverifiable_text(count: int) -> str:
    """Return what a number of such problems means, and the remedy."""
    problems = "1 problem" if count == 1 else f"{count:,} problems"
    return f"{problems} whose answer cannot be verified, so right responses may score 0; `or1 data build` drops them"
