"""The packer beside first-fit decreasing and packing in order: time, and share of empty row slots."""

import numpy as np
import pytest

from or1_kernels import _native


def lengths(count):
    """Return response lengths as in long reasoning: log-normal, clipped at the limit."""
    rng = np.random.default_rng(0)
    return np.minimum(rng.lognormal(8.3, 0.9, count).astype(int) + 100, 32768).tolist()


def in_order(sizes, capacity):
    """Pack in order: start a new row if the next sequence does not fit the last row."""
    bins, room = [], 0
    for i, size in enumerate(sizes):
        if size > room:
            bins.append([])
            room = capacity
        bins[-1].append(i)
        room -= size
    return bins


def first_fit_decreasing(sizes, capacity):
    """Pack the longest sequences first, each into the first row with room."""
    bins, rooms = [], []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        b = next((b for b, room in enumerate(rooms) if sizes[i] <= room), len(bins))
        if b == len(bins):
            bins.append([])
            rooms.append(capacity)
        bins[b].append(i)
        rooms[b] -= sizes[i]
    return bins


PACKERS = {
    "or1 best fit (C++)": _native.pack_best_fit,
    "first fit (Python)": first_fit_decreasing,
    "in order (Python)": in_order,
}


@pytest.mark.parametrize("count", [256, 4096])
@pytest.mark.parametrize("packer", PACKERS)
def test_packing(packer, count, benchmark, record):
    """Add one row of the table. Check that every sequence is packed once."""
    sizes, capacity = lengths(count), 32768
    bins = benchmark.pedantic(PACKERS[packer], args=(sizes, capacity), rounds=5, warmup_rounds=1)
    assert sorted(i for b in bins for i in b) == list(range(count))
    assert all(sum(sizes[i] for i in b) <= capacity for b in bins)
    benchmark.group = f"{count} sequences"
    record(
        "packing",
        {
            "packer": packer,
            "sequences": count,
            "tokens": sum(sizes),
            "rows": len(bins),
            "empty": 1 - sum(sizes) / (len(bins) * capacity),
            "ms": 1e3 * benchmark.stats.stats.min,
        },
    )
