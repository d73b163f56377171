"""Candidates in a child process: one that raises, hangs or crashes leaves this process and the next candidate alone."""

from __future__ import annotations

import os
import time

import pytest

from or1.core.processes import descendants
from or1.tune.process import Child
from or1.tune.search import Budget, CandidateError

FAKES = "tests.helpers.tuner_fakes"


def child(function: str = "benches", **behaviour: object) -> Child:
    return Child({"behaviour": behaviour}, Budget(300, lambda done, total: None), f"{FAKES}:{function}")


def reason(runner: Child, name: str, limit_s: float = 30.0) -> str:
    with pytest.raises(CandidateError) as caught:
        runner.check("head", {"head_impl": name}, limit_s)
    return str(caught.value)


def test_a_candidate_that_raises_is_out_and_its_process_goes_on() -> None:
    with child(bad="raise", big="memory", good=0.25) as runner:
        assert reason(runner, "bad") == "RuntimeError: no kernel for this shape"
        process = runner._process
        assert reason(runner, "big").startswith("out of memory: RuntimeError: CUDA out of memory")
        assert runner.check("head", {"head_impl": "good"}, 30.0) == 0.25
        assert runner.seconds("chunk", {"head_chunk_rows": 4}, 30.0) == 0.025
        assert runner._process is process
    assert process.poll() is not None


def test_a_candidate_that_hangs_is_ended_in_time_and_the_next_gets_a_new_process() -> None:
    ticks: list[int] = []
    budget = Budget(300, lambda done, total: ticks.append(done))
    with Child({"behaviour": {"slow": "hang", "good": 1.0}}, budget, f"{FAKES}:benches") as runner:
        runner.prepare("head", 60.0)
        began = time.monotonic()
        assert reason(runner, "slow", 1.2) == "no answer within 1.2 s; it was ended"
        assert time.monotonic() - began < 10 and len(ticks) >= 2, "the display lives meanwhile"
        # Its own limit would not be enough for the start of the process.
        assert runner.seconds("head", {"head_impl": "good"}, 0.5) == 0.1
    assert not [pid for pid in descendants(os.getpid()) if _is_child(pid)]


def _is_child(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"or1.tune.child" in file.read()
    except OSError:
        return False


def test_a_candidate_that_crashes_its_process_is_out_with_signal_and_last_words() -> None:
    with child(dies="die", good=1.0) as runner:
        text = reason(runner, "dies")
        assert text.startswith("its process ended (signal SIGSEGV)"), text
        assert runner.check("head", {"head_impl": "good"}, 30.0) == 1.0


def test_an_error_of_the_device_costs_the_process_too() -> None:
    with child(lost="device", good=1.0) as runner:
        assert "illegal memory access" in reason(runner, "lost")
        assert runner._process is None
        assert runner.check("head", {"head_impl": "good"}, 30.0) == 1.0


def test_benches_that_cannot_be_made_are_a_reason_not_a_crash() -> None:
    with child("broken") as runner, pytest.raises(CandidateError, match="ImportError: no bench here"):
        runner.prepare("head", 30.0)
