"""Order of the prompts: a pure function of (seed, epoch, cursor), so that a run can resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from or1.core.errors import DataError


@dataclass(frozen=True)
class SamplerState:
    """Position in the data: the first `cursor` places of `epoch` are done. Always 0 <= cursor < n."""

    epoch: int = 0
    cursor: int = 0


class Pool(NamedTuple):
    """One file of a mixture: prompts start .. start + size - 1, with the share weight / sum of weights."""

    start: int
    size: int
    weight: float


class Sampler:
    """Order of n prompts; each epoch is a permutation that depends on (seed, epoch) only.

    With `pools`, an epoch still has n prompts, divided among the pools by weight. A small pool with a large weight
    repeats prompts within an epoch. A large pool with a small weight continues in the next epoch where it stopped.
    Every pool draws each of its prompts once before it draws any of them again.
    """

    def __init__(self, n: int, seed: int, pools: Sequence[Pool] = ()):
        if n < 1:
            raise DataError(f"the sampler needs at least 1 prompt, got {n}; check data.train")
        self.n, self.seed, self._pools = n, seed, tuple(pools)
        self._counts = _shares(n, self._pools)
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def take(
        self, state: SamplerState, count: int, skip_N: np.ndarray | None = None
    ) -> tuple[np.ndarray, SamplerState]:
        """Return the next `count` prompt indices, i64[count], and the state after them. May span several epochs.

        skip_N  bool[n], prompts to skip. The cursor counts places in the order of all prompts. The order of the other
                prompts therefore does not depend on the skipped ones, which may change between calls

        Raises DataError for a state that does not fit the data, or if every prompt is skipped.
        """
        if not 0 <= state.cursor < self.n or state.epoch < 0:
            raise DataError(f"{state} does not fit {self.n} prompts; resume with the data files the run started with")
        if skip_N is not None and skip_N.all():
            raise DataError(
                f"all {self.n} prompts are to be skipped; add harder ones to data.train, or set "
                "data.drop_solved = false"
            )
        epoch, cursor = state.epoch, state.cursor
        parts = []
        while count > 0:
            rest = self._order(epoch)[cursor:]
            places = np.arange(len(rest)) if skip_N is None else np.flatnonzero(~skip_N[rest])
            places = places[:count]
            parts.append(rest[places])
            count -= len(places)
            cursor += int(places[-1]) + 1 if count == 0 else len(rest)
            if cursor == self.n:
                epoch, cursor = epoch + 1, 0
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64), SamplerState(epoch, cursor)

    def _order(self, epoch: int) -> np.ndarray:
        if self._cached[0] != epoch:
            order = self._permutation(self.n, epoch)
            self._cached = (epoch, self._mixture(epoch)[order] if self._pools else order)
        return self._cached[1]

    def _mixture(self, epoch: int) -> np.ndarray:
        """Return the n prompts of an epoch, pool by pool: places epoch * count .. of each pool's own infinite order."""
        parts = []
        for p, (pool, count) in enumerate(zip(self._pools, self._counts, strict=True)):
            places = np.arange(epoch * count, (epoch + 1) * count)
            rounds = {int(r): self._permutation(pool.size, int(r), p) for r in np.unique(places // pool.size)}
            parts.append([pool.start + rounds[place // pool.size][place % pool.size] for place in places.tolist()])
        return np.concatenate(parts).astype(np.int64)

    def _permutation(self, size: int, *key: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, *key]))).permutation(size)


def _shares(n: int, pools: Sequence[Pool]) -> list[int]:
    """Return the number of prompts per pool in an epoch of n, by the largest-remainder method."""
    total = sum(pool.weight for pool in pools)
    exact = [n * pool.weight / total for pool in pools]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(pools)), key=lambda p: counts[p] - exact[p])
    for p in by_remainder[: n - sum(counts)] if pools else []:
        counts[p] += 1
    for pool, count in zip(pools, counts, strict=True):
        if count == 0:
            raise DataError(
                f"a file of data.mix has weight {pool.weight:g} of {total:g}, which is less than one of "
                f"the {n} prompts of an epoch; raise it or leave the file out"
            )
    return counts
