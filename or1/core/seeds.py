"""Seeds derived from the config's seed and counters, so that a resumed run and every rank compute the same ones."""

from __future__ import annotations

import numpy as np


def seed_of(*parts: int) -> int:
    """Return a seed in [0, 2**63) that depends on every part and on their order.

    A step uses seed_of(config.seed, step), its refill number n uses seed_of(config.seed, step, n).
    """
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0] >> 1)


def seed_of_32_bits(*parts: int) -> int:
    """Return a seed in [0, 2**31), for servers that accept no larger seed."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint32)[0] >> 1)
