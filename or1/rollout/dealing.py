"""Order and distribution of the responses of a rollout: longest expected first, taken as engines have room.

Every rank makes the same list of units, and a counter that all ranks share hands the units out. So no engine is idle
while another has work in its queue. The expected length decides the order and nothing else: the random
numbers of a response depend on its prompt and its sample alone.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from or1.core.types import Group, OpenGroup, Prompt
from or1.rollout.engine import Job, Slot

AHEAD = 8
"""An engine of batch_size B holds at most B / AHEAD responses that have no token yet: others might start them now."""
FILL = 1.5
"""Expected tokens of the open responses at their ends, over the tokens of the cache: they do not end all at once.
Simulated for a 7B model (benchmarks/rollout): 1 leaves the cache half empty, and 3 costs as much as no limit."""
MOST_SOLVED = 16
"""Samples behind a count of extra_info.model_difficulty."""


class Counter(Protocol):
    """A counter of all takers."""

    def add(self, amount: int) -> int:
        """Add to the counter, which starts at 0; return the sum. Atomic over all takers."""
        ...


class Alone:
    """The counter of a single taker."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, amount: int) -> int:
        """Add to the counter; return the sum."""
        self._sum += amount
        return self._sum


class Hand:
    """The units of one taker, by their place in the common order.

    Each taker first gets units of its own, dealt in turns. Without them a taker that starts a moment earlier would take
    the longest responses of all. The rest is taken by demand, from a counter.

    count    units in all
    takers   number of takers
    taker    index of this taker
    room     units that every taker has room for at the start
    """

    def __init__(self, count: int, takers: int, taker: int, room: int, counter: Counter):
        # At least half of the units stay for those who are done first, if there are two for each.
        rounds = min(room, max(count // (2 * takers), 1)) if count >= takers else 0
        # Turns alternate in direction, so that no taker always has the longest of a round.
        self._own = deque(k * takers + (taker if k % 2 == 0 else takers - 1 - taker) for k in range(rounds))
        self._first, self._count, self._takers, self._counter = rounds * takers, count, takers, counter
        self._seen = self._first

    def take(self, most: int) -> list[int]:
        """Return the next places, at most `most`; an empty list if no unit is left."""
        if most < 1:
            return []
        if self._own:
            return [self._own.popleft() for _ in range(min(most, len(self._own)))]
        left = self._count - self._seen
        if left <= 0:
            return []
        # Less than an even part of what is left, so that the last units are taken one at a time.
        wanted = min(most, max(left // (2 * self._takers), 1))
        end = self._first + self._counter.add(wanted)
        self._seen = max(self._seen, end)
        return list(range(end - wanted, min(end, self._count)))


class Window:
    """How many responses an engine takes at a time.

    batch_size    most open responses
    shared        others take from the same supply, so few responses may wait here for a first token
    cache_tokens  tokens that the engine's cache holds, None if unknown. Responses begin short, so an engine that takes
                  what fits now takes too many, and must drop and compute again what it has begun
    typical       tokens of a response at its end, with its prompt
    """

    def __init__(self, batch_size: int, *, shared: bool, cache_tokens: int | None = None, typical: float = 0.0):
        self._batch_size = batch_size
        self._ahead = first_room(batch_size) if shared else batch_size
        self._cache = FILL * cache_tokens if shared and cache_tokens and typical else math.inf
        self._typical = max(typical, 1.0)

    def room(self, open_: int, waiting: int, held: float = 0.0) -> int:
        """Return the number of responses to take now.

        open_    responses that the engine has
        waiting  those of them without a token
        held     expected tokens of all of them at their end
        """
        room = min(self._batch_size - open_, self._ahead - waiting)
        if self._cache < math.inf:
            room = min(room, int((self._cache - held) / self._typical))
        # An engine without any response takes one, however long it is expected to be.
        return max(room, int(open_ == 0))


def first_room(batch_size: int) -> int:
    """Return the responses that an engine takes at the start: a full cache shows in responses without a token."""
    return max(batch_size // AHEAD, 1)


class Given:
    """The jobs of one caller, in order."""

    def __init__(self, jobs: Iterable[Job]):
        self._jobs = iter(jobs)

    def take(self, room: int) -> list[Job]:
        """Return the next `room` jobs, as `Supply.take`."""
        return list(itertools.islice(self._jobs, max(room, 0)))


class Dealt:
    """Units of jobs that several takers share: single jobs, or the batches of an engine with fixed batches.

    expected  tokens that the job of each slot is expected to add
    batches   the units are batches, of which `take` returns one at a time
    """

    def __init__(
        self,
        units: Sequence[Sequence[Job]],
        hand: Hand,
        expected: Mapping[Slot, float] | None = None,
        *,
        batches: bool = False,
    ):
        self._units, self._hand, self._batches = units, hand, batches
        self._expected = expected or {}

    @property
    def typical(self) -> float:
        """Mean over all jobs of `context`."""
        return float(np.mean([self.context(job) for unit in self._units for job in unit])) if self._units else 0.0

    def context(self, job: Job) -> float:
        """Return the tokens of a job's sequence at its end, as expected, with its prompt."""
        return len(job.context_ids) + self._expected.get(job.slot, 0.0)

    def take(self, room: int) -> list[Job]:
        """Return the jobs of the next units, as `Supply.take`; of one batch, if the units are batches."""
        return self.jobs(self.claim(room))

    def claim(self, room: int) -> list[int]:
        """Take units for `room` jobs; return their places. For ranks that share one model, see `jobs`."""
        return self._hand.take(min(room, 1) if self._batches else room)

    def jobs(self, places: Iterable[int]) -> list[Job]:
        """Return the jobs of units that this taker, or the first rank of its group, has claimed."""
        return [job for place in places for job in self._units[place]]


def longest_first(expected: Sequence[float]) -> list[int]:
    """Return the indices of `expected`, the largest first; equal ones in their order."""
    return sorted(range(len(expected)), key=lambda i: (-expected[i], i))


def single_units(jobs: Sequence[Job], expected: Sequence[float]) -> list[list[Job]]:
    """Return units of one job, longest expected first."""
    return [[jobs[i]] for i in longest_first(expected)]


def fixed_units(jobs: Sequence[Job], expected: Sequence[float], size: int, parts: int) -> list[list[Job]]:
    """Return units for an engine with fixed batches: those whose longest response is expected to be longest first.

    A batch has the jobs of every parts-th prompt, in order. So its content depends on the number of ranks, and not on
    the rank that takes the batch nor on expected lengths: rounding in a batch depends on its rows.
    """
    units: list[list[int]] = []
    for part in range(parts):
        mine = [i for i, job in enumerate(jobs) if job.slot[0] % parts == part]
        units += [mine[at : at + size] for at in range(0, len(mine), size)]
    order = longest_first([max(expected[i] for i in unit) for unit in units])
    return [[jobs[i] for i in units[place]] for place in order]


@dataclass
class ResponseLengths:
    """Mean length of the responses to each prompt at its last visit, by prompt id. Part of a run's state."""

    tokens: dict[str, int] = field(default_factory=dict)

    def note(self, groups: Iterable[Group]) -> None:
        """Record the groups of a step."""
        for group in groups:
            self.tokens[group.prompt.id] = round(np.mean([len(r.token_ids) for r in group.responses]))

    def expected(
        self, prompts: Sequence[Prompt], jobs: Sequence[Job], carried: Sequence[OpenGroup] = ()
    ) -> list[float]:
        """Return the tokens that each job is expected to add.

        prompts  of the call, those of `carried` first
        carried  groups of an earlier call; their finished responses tell most about the others

        The length is the mean of the finished siblings, else that of the prompt's last visit. Without a visit it is a
        guess from the row's counts of solved attempts. An unfinished response beyond that grows by half.
        """
        # Without any visit, half of the limit: what is carried over is then compared with something.
        known: list[float] = [*self.tokens.values()]
        typical = float(np.mean(known or [job.max_new / 2 for job in jobs] or [0.0]))
        whole = [self.tokens.get(p.id, typical * (0.5 + _difficulty(p))) for p in prompts]
        for i, group in enumerate(carried):
            finished = [r for r, s in zip(group.responses, group.scores, strict=True) if s is not None]
            if finished:
                whole[i] = float(np.mean([len(r.token_ids) for r in finished]))
        return [_remaining(whole[job.slot[0]], job) for job in jobs]

    def copy(self) -> ResponseLengths:
        """Return a copy that later steps do not change, for a rollout that another thread makes."""
        return ResponseLengths(dict(self.tokens))

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint's manifest."""
        return {"tokens": dict(self.tokens)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.tokens = {str(name): int(tokens) for name, tokens in state["tokens"].items()}


def _remaining(whole: float, job: Job) -> float:
    have = 0 if job.unfinished is None else len(job.unfinished.token_ids)
    return min(max(whole - have, have / 2), job.max_new)


def _difficulty(prompt: Prompt) -> float:
    """Return the share of failed attempts in the row's counts, 0 to 1; a half if there are none."""
    info = prompt.row.get("extra_info")
    counts = info.get("model_difficulty") if isinstance(info, Mapping) else None
    if not isinstance(counts, Mapping):
        return 0.5
    given = np.array([n for n in counts.values() if isinstance(n, int | float)])
    return min(max(1 - float(given.mean()) / MOST_SOLVED, 0.0), 1.0) if len(given) else 0.5
