"""Seeds that a resumed run, and every rank, derives anew from the same numbers."""

from __future__ import annotations

import numpy as np


def seed_of(*parts: int) -> int:
    """Return a seed in [0, 2**63) that depends on every part and on their order.

    A step draws from seed_of(config.seed, step), its refill n from seed_of(config.seed, step, n).
    """
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0] >> 1)


def seed_of_32_bits(*parts: int) -> int:
    """Return a seed in [0, 2**31), for servers that take no larger one."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint32)[0] >> 1)
