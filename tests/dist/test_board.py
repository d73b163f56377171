"""Ranks meet however long one of them works, and only silence ends a meeting. No clock here is real."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from or1.core.errors import EXIT_RETRY, RankSilent
from or1.dist import board as boards
from or1.dist.board import STATUS_KEY, Board

LIMIT_S = 1800.0
"""The default of dist.timeout_s."""


class Ranks:
    """A store, its clock, and what the ranks other than 0 do in it.

    arrivals  second at which each rank comes to the meeting; infinity: never
    status    what a rank has published at a second
    """

    def __init__(self, arrivals: dict[int, float], status: Callable[[int, float], dict | None]):
        self.now, self.arrivals, self.status = 0.0, arrivals, status
        self.counters: dict[str, int] = {}
        self.values: dict[str, str] = {}
        self.prefix = "or1/test"

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def _here(self) -> list[int]:
        return [rank for rank, second in self.arrivals.items() if second <= self.now]

    def add(self, key: str, amount: int) -> int:
        self.counters[key] = self.counters.get(key, 0) + amount
        return self.counters[key] + len(self._here())

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def _known(self) -> dict[str, str]:
        found = dict(self.values)
        for rank in self.arrivals:
            if (status := self.status(rank, self.now)) is not None:
                found[STATUS_KEY.format(rank)] = json.dumps(status)
        return found | {f"{self.prefix}/at/{rank}": "1" for rank in self._here()}

    def check(self, keys: list[str]) -> bool:
        return all(key in self._known() for key in keys)

    def multi_get(self, keys: list[str]) -> list[str]:
        return [self._known()[key] for key in keys]

    def meet(self, monkeypatch: pytest.MonkeyPatch) -> float:
        """Let rank 0 come at second 0; return the seconds that it waited."""
        monkeypatch.setattr(boards.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(boards.time, "sleep", self.sleep)
        Board(self, 0, 1 + len(self.arrivals), session="test", timeout_s=LIMIT_S).meet()
        return self.now


def generating(rank: int, now: float) -> dict:
    """Return the status of a rank whose engine made progress within the last minute."""
    return {"step": 3, "phase": "rollout", "done": 5, "total": 1024, "beat": int(now), "work": int(now // 60)}


@pytest.mark.parametrize(("mean", "cv"), [(8e3, 0.4), (8e3, 0.6), (12e3, 0.4), (12e3, 0.6), (16e3, 0.4), (16e3, 0.6)])
def test_ranks_with_longer_responses_are_waited_for(mean: float, cv: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 3.5 of OR1-Math-7B on 8 GPUs, 16 prompts of 64 responses a rank, 2,600 tokens/s: waits beyond the limit."""
    rng, width, waits = np.random.default_rng(1), np.sqrt(np.log1p(cv**2)), []
    for _ in range(6):
        prompts = rng.lognormal(np.log(mean) - width**2 / 2, width, (8, 16))
        seconds = np.sort(np.minimum(prompts, 32e3).sum(1) * 64 / 2600)
        later = {rank: float(s - seconds[0]) for rank, s in enumerate(seconds[1:], 1)}
        waited = Ranks(later, generating).meet(monkeypatch)
        assert later[7] <= waited < later[7] + 1
        waits.append(waited)
    if mean == 16e3:
        assert max(waits) > LIMIT_S, "such a wait ended the run before"


def test_a_rank_that_stops_to_work_ends_the_meeting_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its watchdog still publishes: the heartbeat counts, the work does not.
    hangs = Ranks({1: 3000.0, 2: np.inf}, lambda rank, now: generating(rank, now) | {"work": int(min(now, 2400) // 60)})
    with pytest.raises(
        RankSilent, match=r"rank 2 .*no progress for 18\d\d s \(dist.timeout_s = 1800\).*'rollout'"
    ) as e:
        hangs.meet(monkeypatch)
    assert 2400 + LIMIT_S <= hangs.now < 2400 + LIMIT_S + 15 and e.value.exit_code == EXIT_RETRY


def test_a_rank_that_was_never_heard_of_ends_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks({1: np.inf}, lambda rank, now: None)
    with pytest.raises(RankSilent, match=r"rank 1 .*its last status: none"):
        ranks.meet(monkeypatch)
    assert LIMIT_S <= ranks.now < LIMIT_S + 15


def test_a_pause_of_the_whole_machine_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks({1: 9000.0}, lambda rank, now: generating(rank, now))
    step = ranks.sleep

    def sleep(seconds: float) -> None:
        step(5000.0 if 100 < ranks.now < 200 else seconds)

    monkeypatch.setattr(ranks, "sleep", sleep)
    ranks.status = lambda rank, now: generating(rank, now) | {"work": 1 if now < 5500 else int(now)}
    assert ranks.meet(monkeypatch) >= 9000


def test_the_nth_counter_of_a_name_is_the_same_on_all_ranks() -> None:
    store = Ranks({}, generating)
    first, second = (Board(store, rank, 2, session="test", timeout_s=LIMIT_S) for rank in range(2))
    ours = [first.counter("a"), first.counter("b"), first.counter("a")]
    theirs = [second.counter("a"), second.counter("a"), second.counter("b")]
    assert [c.add(1) for c in ours] == [1, 1, 1]
    assert [c.add(2) for c in theirs] == [3, 3, 3]
    assert Board(store, 0, 2, session="later", timeout_s=1).counter("a").add(1) == 1
