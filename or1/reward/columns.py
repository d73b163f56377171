"""Check before training that the data has the columns that a user-defined reward function requires."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from or1.core.errors import RewardFunctionError
from or1.core.text import visible
from or1.core.types import Prompt

_SHOWN = 20


def check_columns(needs: Mapping[str, Any], prompts: Iterable[Prompt]) -> list[str]:
    """Return a warning for each required column that only some rows have.

    needs  result of `or1.reward.custom.needs_of`

    Raises RewardFunctionError if no row has a required column.
    """
    if not needs["columns"]:
        return []
    rows = 0
    has: Counter[str] = Counter()
    without: dict[str, str] = {}
    for prompt in prompts:
        rows += 1
        has.update(prompt.row.keys())
        for name in needs["columns"]:
            if name not in prompt.row:
                without.setdefault(name, prompt.id)
    if not rows:
        return []
    if absent := [name for name in needs["columns"] if not has[name]]:
        names = [visible(name) for name in has]
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise RewardFunctionError(
            f"reward.kind: no row has {', '.join(map(repr, absent))}, which {needs['name']}() needs; rows have "
            f"{shown or 'no columns'}. Rename the parameter or the column, or give the parameter a default"
        )
    return [
        f"{rows - has[name]:,} of {rows:,} rows have no {name!r}, which {needs['name']}() needs (the first is "
        f"{visible(without[name])}): their responses will be crashes, without a reward"
        for name in without
    ]
