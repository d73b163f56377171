"""The penalty for responses near the limit (DAPO, arXiv:2503.14476, Eq. 13)."""

# P prompts, M responses each

from __future__ import annotations

import numpy as np


def overlong_penalty(lengths_PM: np.ndarray, limit: int, buffer: int) -> np.ndarray:
    """Return DAPO's soft overlong punishment (arXiv:2503.14476, Eq. 13), to be added to the rewards; f64[P, M] <= 0.

        0                            up to limit - buffer tokens
        (limit - buffer - L)/buffer  beyond, falling linearly
        -1                           at the limit, where the response is truncated

    lengths_PM  i64[P, M] response tokens
    limit       max_response_tokens
    buffer      1 <= buffer <= limit tokens; other values raise ValueError
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"overlong buffer is {buffer} tokens; it must lie between 1 and the response limit {limit}")
    return np.asarray(-np.clip((lengths_PM - (limit - buffer)) / buffer, 0.0, 1.0))
