r"""The reward of the study: 1 for the sum in \boxed{} after the chain of thought, 0 for anything else.

The numbers are plain integers, so no mathematics verifier is needed, and a run's reward process starts fast.
"""

from __future__ import annotations

import re

_ANSWER = re.compile(r"</think>\\boxed\{(\d+)\}$")


def score(solution_str: str, ground_truth: str) -> float:
    """Return the reward, with verl's arguments. A truncated response has no complete box and scores 0."""
    found = _ANSWER.search(solution_str)
    return float(found is not None and found[1] == ground_truth)
