"""User reward functions that fork, forge, print, fill the memory or hang: each costs its own job."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from or1.core.processes import descendants
from or1.core.types import Prompt, Status
from or1.reward import pool
from or1.reward.child import MAX_CAUSE
from tests.helpers.orders import response, results, scores

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, subreapers and pidfds")
pytestmark = [needs_linux, pytest.mark.timeout(120)]


def zombies(parent: int) -> int:
    """Dead processes that a process has not waited for."""
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, above = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        found += state == "Z" and int(above) == parent
    return found


def gone(pids: set[int], seconds: float) -> bool:
    """Return True if none of the processes lives after at most `seconds`."""
    end = time.monotonic() + seconds
    while living := [pid for pid in pids if Path(f"/proc/{pid}").exists() and state_of(pid) not in "ZX"]:
        if time.monotonic() > end:
            return not living
        time.sleep(0.02)
    return True


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


@pytest.mark.parametrize("order", ["fork", "fork-raise", "fork-exit", "fork-hang"])
def test_a_copy_that_a_function_forks_never_gives_a_reward(order: str, obeying, capfd) -> None:
    orders = [f"{order} {i}" if i % 3 == 0 else f"plain {i}" for i in range(1, 13)]
    assert results(obeying(), *orders) == [float(i) for i in range(1, 13)]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("order", ["forge", "forge-half", "forge-huge", "forge-long"])
def test_what_a_function_writes_into_pipes_is_no_reward_and_shifts_none(order: str, obeying) -> None:
    found = scores(obeying(), "plain 2", f"{order} 3", "plain 4", "plain 5", f"{order} 6", "plain 7")
    assert [s.reward for s in found if s.status is Status.OK] == [2, 4, 5, 7]
    assert [s.status for s in found].count(Status.CRASH) == 2
    assert "wrote into the pipe" in found[1].cause


def test_a_forgery_between_two_jobs_costs_a_job_and_sets_none(obeying) -> None:
    scorer = obeying()
    assert results(scorer, "forge-later 2") == [2]
    time.sleep(0.6)
    assert results(scorer, "plain 3", "plain 4") == ["crash", 4]


def test_a_reply_under_another_number_replaces_the_worker(obeying, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = obeying()
    worker = scorer._pool._workers[0]
    before, numbers = worker._process.pid, iter([b"a" * 16, b"b" * 16])
    monkeypatch.setattr(pool.secrets, "token_bytes", lambda size: next(numbers))
    receive = worker._process.socket.recv_bytes
    monkeypatch.setattr(worker._process.socket, "recv_bytes", lambda: b"z" * 16 + receive()[16:], raising=False)
    assert results(scorer, "plain 2", "plain 3") == ["crash", 3]
    assert worker._process.pid != before


FIRST_OF_A_CONTAINER = """
import ctypes, sys, time
import numpy as np
from pathlib import Path
from or1.reward.scorers import CustomScorer
from or1.core.types import Prompt, Response

def dead():
    me, found = str(__import__("os").getpid()), 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, above = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        found += state == "Z" and above == me
    return found

ctypes.CDLL(None).prctl(36, ctypes.c_ulong(1), 0, 0, 0)  # orphans come here, as to process 1
with CustomScorer(sys.argv[1], workers=1, timeout_s=1) as scorer:
    prompt = Prompt("t:1", "t", "?", np.array([1]), row={"place": sys.argv[2]})
    for order in ["daemon 1"] * 8 + ["daemon-long 1"] + ["plain 2"] * 2:
        scorer.submit(prompt, Response(np.array([1]), np.zeros(1), "stop", 0, order)).result()
    time.sleep(0.5)
    print(dead())
    scorer.submit(prompt, Response(np.array([1]), np.zeros(1), "stop", 0, "daemon-long 1"))
    time.sleep(0.5)
time.sleep(0.2)
print(dead())
"""


@pytest.mark.slow
def test_no_zombies_are_left_where_the_first_process_does_not_reap(function: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FIRST_OF_A_CONTAINER, function, str(tmp_path / "pids")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["0", "0"]


def test_orphans_of_a_grader_are_reaped_by_its_worker(obeying) -> None:
    scorer = obeying()
    assert results(scorer, *["daemon 1"] * 6) == [1] * 6
    worker, end = scorer._pool._workers[0]._process.pid, time.monotonic() + 5
    while (left := zombies(worker)) and time.monotonic() < end:
        assert results(scorer, "plain 3") == [3]
    assert left == 0


@pytest.mark.slow
def test_a_function_that_escapes_its_timer_costs_its_own_job(obeying) -> None:
    orders, scorer = ("ignore", "timer", "stop", "length"), obeying(timeout_s=0.3, workers=4)
    workers = [worker._process.pid for worker in scorer._pool._workers]
    assert results(scorer, *orders, *["plain 2"] * 8) == ["timeout"] * 3 + ["crash"] + [2] * 8
    assert [worker._process.pid for worker in scorer._pool._workers] == workers, "the warm processes stay"


def test_what_a_function_put_into_another_session_ends_with_it(obeying, tmp_path: Path) -> None:
    scorer = obeying(timeout_s=0.5)
    found = scores(scorer, "daemon-long 1", "plain 2", place=tmp_path / "pids")
    assert [s.status for s in found] == [Status.TIMEOUT, Status.OK]
    worker = scorer._pool._workers[0]._process.pid
    assert len(descendants(worker)) == 1, "the child that grades"


def test_closing_a_scorer_ends_what_a_function_put_into_another_session(obeying, tmp_path: Path) -> None:
    before, scorer = set(descendants(os.getpid())), obeying()
    prompt = Prompt("t:1", "t", "?", np.array([1], np.int32), row={"place": str(tmp_path / "pids")})
    scorer.submit(prompt, response("daemon-long 1"))
    while not (tmp_path / "pids").exists():
        time.sleep(0.02)
    started = set(descendants(os.getpid())) - before
    assert len(started) == 3
    scorer.close()
    assert gone(started, 2)


TRAINER = """
import sys, time
import numpy as np
from or1.reward.scorers import CustomScorer
from or1.core.types import Prompt, Response
scorer = CustomScorer(sys.argv[1], workers=1, timeout_s=100)
prompt = Prompt("t:1", "t", "?", np.array([1]), row={"place": sys.argv[3]})
scorer.submit(prompt, Response(np.array([1]), np.zeros(1), "stop", 0, sys.argv[2]))
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("order", ["ignore", "timer", "stop", "length", "daemon-long", "fork-hang"])
def test_nothing_outlives_a_killed_trainer(order: str, function: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAINER, function, order, str(tmp_path / "pids")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        try:
            assert trainer.stdout.readline() == "up\n"
            time.sleep(0.5)
            started = set(descendants(trainer.pid))
            assert len(started) >= 1 + (order != "length"), "that one is killed for what it wrote"
        finally:
            trainer.kill()
    assert gone(started, 5)


def test_a_grader_ends_with_a_killed_worker(obeying) -> None:
    scorer = obeying()
    worker = scorer._pool._workers[0]._process.pid
    children = set(descendants(worker))
    os.kill(worker, signal.SIGKILL)
    # A worker that is still dying takes a job and loses it.
    assert gone({worker, *children}, 2)
    assert results(scorer, "plain 2") == [2]


def test_every_way_out_of_a_call_is_a_counted_crash_without_a_traceback(obeying, capfd) -> None:
    orders = ["sys.exit", "interrupt", "generator-exit", "sullen"]
    found = scores(obeying(), *orders, "plain 2")
    assert [s.status.value for s in found] == ["crash"] * 4 + ["ok"]
    words = ["SystemExit: bye", "KeyboardInterrupt", "GeneratorExit", "Sullen: (its message cannot be read)"]
    assert all(score.cause.startswith(word) for score, word in zip(found, words, strict=False))
    assert "Traceback" not in capfd.readouterr().err


def test_the_text_of_an_exception_is_cut_and_keeps_its_place(obeying, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        long = scores(obeying(), "long")[0]
    assert len(long.cause) < MAX_CAUSE + 300 and "(of 30,000,000 characters)" in long.cause
    assert "rewards.py:" in long.cause, "the place stays"
    assert len(caplog.text) < 10_000


def test_control_characters_of_a_cause_are_spelt_out(obeying, caplog: pytest.LogCaptureFixture) -> None:
    found = scores(obeying(), "escape \x1b[2J 1")[0]
    assert found.cause.startswith("ValueError: <U+001B>[2J<U+D800> (")
    assert "\x1b" not in caplog.text and "<U+001B>" in caplog.text
