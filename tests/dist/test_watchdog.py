"""Silence of other ranks counts only while this rank was awake."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from or1.dist.watchdog import Watchdog
from or1.dist.world import SINGLE


def test_a_rank_that_was_paused_itself_gives_the_others_that_time(monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = Watchdog(SINGLE, 6.0)
    watchdog._seen = {1: ({"step": 0, "phase": "start"}, 100.0)}
    watchdog._forgive(1.0)
    assert watchdog._seen[1][1] == 100.0, "a little late is no pause"
    watchdog._forgive(14.0)
    assert watchdog._seen[1][1] == 114.0


class PausedStore:
    """A store whose other rank gives no sign."""

    def set(self, key: str, value: str) -> None:
        """Store nothing."""

    def multi_get(self, keys: list[str]) -> list[str]:
        """Return the state of a live peer for every key."""
        return [json.dumps({"step": 1, "phase": "train", "done": 0, "total": None, "beat": 1}) for _ in keys]


@pytest.mark.parametrize("paused", [True, False])
def test_only_silence_that_this_rank_was_awake_for_ends_the_run(paused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = [0.0], [0]
    watchdog = Watchdog(replace(SINGLE, size=1), 6.0)
    watchdog.world = replace(SINGLE, size=2)
    watchdog._store = PausedStore()

    class Ended(Exception):
        pass

    def wait(period: float) -> bool:
        looks[0] += 1
        clock[0] += 14.0 if paused and looks[0] == 3 else 0.1 if paused else period
        return looks[0] > 10

    def give_up(reason: str) -> None:
        raise Ended(reason)

    monkeypatch.setattr("or1.dist.watchdog.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog._stopped, "wait", wait)
    monkeypatch.setattr(watchdog, "_give_up", give_up)
    if paused:
        watchdog._watch()
    else:
        with pytest.raises(Ended, match="no sign of life"):
            watchdog._watch()
