"""Functions of the user's own that fork, forge, print, fill the memory or refuse to end: what each costs, and whom."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from or1.core.errors import RewardFunctionError, ScorerError
from or1.core.processes import descendants
from or1.core.types import Prompt, Response, Score, Status
from or1.reward import capacity, output, pool
from or1.reward.capacity import WORKER_MIB, WORKERS_PER_CORE, check_workers
from or1.reward.child import MAX_CAUSE
from or1.reward.output import LOG_NAME, OutputLog
from or1.reward.scorers import CustomScorer, MathScorer

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, subreapers and pidfds")
pytestmark = [needs_linux, pytest.mark.timeout(120)]

# A response is an order: a word, and what comes after it. The reward of what is obeyed and returns is the number in it.
FUNCTION = """
import array, ctypes, json, os, signal, socket, struct, sys, threading, time

def frame(data):
    return struct.pack("!i", len(data)) + data

FORGED = json.dumps(["ok", 1.0, ""]).encode()

def sockets():
    for fd in range(3, 64):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                yield fd
        except OSError:
            pass

def forge(*messages):
    for fd in sockets():
        for message in messages:
            os.write(fd, message)

def daemon(seconds):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(seconds)
        os._exit(0)
    os.wait()

class Sullen(Exception):
    def __str__(self):
        raise KeyError("no words")

def reward(completions, **columns):
    order, _, rest = completions[0].partition(" ")
    number = float(rest.split()[-1]) if rest else 0.25
    if order == "fork":
        os.fork()
    elif order == "fork-raise" and os.fork() == 0:
        raise KeyError("in the copy")
    elif order == "fork-exit" and os.fork() == 0:
        sys.exit(3)
    elif order == "fork-hang" and os.fork() == 0:
        time.sleep(60)
    elif order == "forge":
        forge(frame(FORGED))
    elif order == "forge-half":
        forge(struct.pack("!i", 40))
    elif order == "forge-huge":
        forge(struct.pack("!i", 2 ** 30) + b"x")
    elif order == "forge-long":
        forge(frame(os.urandom(16) + b"+" + FORGED))
    elif order == "forge-later":
        threading.Timer(0.3, forge, [frame(os.urandom(16) + b"+" + FORGED)]).start()
    elif order == "daemon":
        daemon(0)
    elif order == "daemon-long":
        daemon(60)
        with open(columns["place"][0], "a") as file:
            print(os.getpid(), file=file)
        time.sleep(60)
    elif order == "ignore":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(60)
    elif order == "timer":
        signal.setitimer(signal.ITIMER_REAL, 0)
        time.sleep(60)
    elif order == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif order == "length":
        forge(struct.pack("!i", -1) + struct.pack("!Q", 2 ** 40))
        time.sleep(60)
    elif order == "sys.exit":
        sys.exit("bye")
    elif order == "interrupt":
        raise KeyboardInterrupt
    elif order == "generator-exit":
        raise GeneratorExit
    elif order == "sullen":
        raise Sullen
    elif order == "long":
        raise ValueError("x" * 30_000_000)
    elif order == "escape":
        raise ValueError(chr(27) + "[2J" + chr(0xD800))
    elif order == "memory":
        ballast.append(bytearray(int(number) << 20))
    elif order == "print":
        for i in range(int(number)):
            print(f"{rest.split()[0]} line {i}", chr(0xD800))
        print("unfinished", end="", file=sys.stderr)
    elif order == "print-bytes":
        line = "x" * 999
        for i in range(int(number) // 1000):
            print(line)
    return [number]

ballast = []
"""


def response(text: str) -> Response:
    return Response(np.array([1], np.int32), np.zeros(1, np.float32), "stop", 0, text)


@pytest.fixture
def function(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text(FUNCTION)
    return f"{tmp_path / 'rewards.py'}:reward"


@pytest.fixture
def obeying(function: str, tmp_path: Path) -> Iterator[Callable[..., CustomScorer]]:
    """Makes scorers with one worker that obey orders."""
    made = []

    def make(**options) -> CustomScorer:
        made.append(CustomScorer(function, **{"workers": 1, "timeout_s": 10.0} | options))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()


def scores(scorer: CustomScorer, *orders: str, place: Path | None = None) -> list[Score]:
    """What orders are worth that wait together."""
    prompt = Prompt("t:1", "t", "?", np.array([1], np.int32), row={"place": str(place)})
    return [f.result(timeout=90) for f in [scorer.submit(prompt, response(order)) for order in orders]]


def results(scorer: CustomScorer, *orders: str) -> list[float | str]:
    """The reward of each order that was obeyed, the status of the others."""
    return [s.status.value if math.isnan(s.reward) else s.reward for s in scores(scorer, *orders)]


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
    """Whether none of the processes lives after at most `seconds`."""
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


# --- forks and forgeries


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


# --- processes that stay


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


def test_no_zombies_are_left_where_the_first_process_does_not_reap(function: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FIRST_OF_A_CONTAINER, function, str(tmp_path / "pids")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["0", "0"]


def test_orphans_of_a_grader_are_reaped_by_its_worker(obeying) -> None:
    scorer = obeying()
    assert results(scorer, *["daemon 1"] * 6) == [1] * 6
    worker, end = scorer._pool._workers[0]._process.pid, time.monotonic() + 5
    while zombies(worker) and time.monotonic() < end:
        assert results(scorer, "plain 3") == [3]
    assert zombies(worker) == 0


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
    assert gone(children, 2)
    assert results(scorer, "plain 2") == [2]


# --- exits, long words and memory


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


def test_memory_has_a_limit_and_the_next_response_has_room_again(obeying) -> None:
    found = scores(obeying(memory_bytes=300 << 20), "memory 200", "memory 150", "memory 151", "plain 2")
    assert [s.status.value for s in found] == ["ok", "crash", "ok", "ok"]
    assert "MemoryError" in found[1].cause and "reward.memory_mib = 300" in found[1].cause


def test_the_default_memory_holds_a_function_that_imports_torch(tmp_path: Path) -> None:
    from or1.config import RewardConfig
    from or1.reward import make_scorer

    path = tmp_path / "own.py"
    path.write_text("import torch\ndef reward(completions):\n    return torch.ones(1000, 1000).mean().reshape(1)\n")
    with make_scorer(RewardConfig(kind=f"{path}:reward", workers=1, timeout_s=30)) as scorer:
        assert results(scorer, "x") == [1.0]


MODULES = {
    "import sys\nsys.exit(3)": "SystemExit: 3 ({file}:2, in <module>)",
    "raise KeyboardInterrupt": "KeyboardInterrupt ({file}:1, in <module>)",
    "raise ValueError(chr(0xD800))": "ValueError: ",
    "import os\nos._exit(0)": "{file}:reward cannot be loaded: its process ended early (exited with code 0)",
    "import os\nos.kill(os.getpid(), 11)": "{file}:reward cannot be loaded: its process ended early (killed by",
    "x = bytearray(1 << 40)": "MemoryError ({file}:1, in <module>); reward.memory_mib = 4096 is the limit",
}


@pytest.mark.parametrize("source", MODULES)
def test_a_module_that_cannot_be_imported_is_the_users_and_named(source: str, tmp_path: Path, capfd) -> None:
    path = tmp_path / "own.py"
    path.write_text(source)
    with pytest.raises(RewardFunctionError) as caught:
        CustomScorer(f"{path}:reward", workers=1, timeout_s=5, memory_bytes=4096 << 20)
    assert MODULES[source].format(file=path) in str(caught.value) and str(path) in str(caught.value)
    assert str(caught.value).isascii() and "Traceback" not in capfd.readouterr().err


def test_a_module_that_forks_while_it_is_imported_is_loaded_once(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("import os\nos.fork()\ndef reward(completions):\n    return [2.0]\n")
    with CustomScorer(f"{path}:reward", workers=1, timeout_s=5) as scorer:
        assert results(scorer, *"abcdef") == [2.0] * 6


def test_the_time_to_load_a_function_anew_is_not_charged_to_a_response(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pool, "GRACE_S", 0.5)
    path = tmp_path / "own.py"
    path.write_text(
        "import os, time\ntime.sleep(1.5)\ndef reward(completions):\n"
        "    return [2.0] if completions[0] != 'exit' else os._exit(1)\n"
    )
    with CustomScorer(f"{path}:reward", workers=1, timeout_s=0.2) as scorer:
        assert results(scorer, "a", "exit", "b") == [2.0, "crash", 2.0]


# --- what a function prints


def test_prints_of_several_workers_are_whole_lines_of_one_log(obeying, tmp_path: Path, capfd) -> None:
    log = tmp_path / LOG_NAME
    scorer = obeying(workers=2, log=log)
    assert not log.exists(), "nothing was printed"
    names = [f"r{i}" for i in range(8)]
    assert results(scorer, *(f"print {name} 200" for name in names)) == [200] * 8
    scorer.close()
    wanted = [f"{name} line {i} \\ud800" for name in names for i in range(200)] + ["unfinished"] * 8
    assert sorted(log.read_text().splitlines()) == sorted(wanted)
    assert capfd.readouterr() == ("", "")


def test_the_log_has_a_limit_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / LOG_NAME
    for _ in range(3):  # several workers and restarts
        log = OutputLog(str(path), limit=10_000)
        write = log.open()
        for i in range(300):
            os.write(write, f"{i} \x1b[2J {'x' * 20}\n".encode())
            log.drain()
        os.write(write, b"rest without an end")
        os.close(write)
        log.close()
    text = path.read_text()
    assert 9_900 <= path.stat().st_size <= 10_000
    assert text.count("later output is lost") == 1 and text.endswith("is lost ---\n")
    assert text.startswith("0 <U+001B>[2J ") and "rest without" not in text


def test_a_flood_of_prints_neither_fills_the_disk_nor_blocks(obeying, tmp_path: Path) -> None:
    log = tmp_path / LOG_NAME
    assert results(obeying(log=log, timeout_s=30.0), "print-bytes 40000000", "plain 2") == [40_000_000, 2]
    assert output.LIMIT_BYTES - 1000 < log.stat().st_size <= output.LIMIT_BYTES


def test_a_log_that_cannot_be_written_costs_no_reward(obeying, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / LOG_NAME).symlink_to(tmp_path / "elsewhere")
    for log in (tmp_path / "no folder" / LOG_NAME, tmp_path / LOG_NAME, tmp_path):
        assert results(obeying(log=log), "print a 100") == [100]
    assert (tmp_path / "elsewhere").read_text() == "", "a link is not followed"


# --- the workers themselves


ENVIRONMENT = """
import json, os

def tell(job):
    with open(job["golds"][0], "w") as file:
        json.dump(dict(os.environ), file)
    return True
"""


def test_the_maths_verifier_gets_no_tokens_and_own_functions_keep_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tells.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_geheim")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    told = tmp_path / "told.json"
    with MathScorer(workers=1, timeout_s=5, grader="tells:tell") as scorer:
        prompt = Prompt("t:1", "t", "?", np.array([1], np.int32), (str(told),))
        assert scorer.submit(prompt, response(r"\boxed{x}")).result(60).status is Status.OK
    found = json.loads(told.read_text())
    assert "geheim" not in told.read_text()
    assert found["LC_ALL"] == "C.UTF-8" and found["PATH"] == os.environ["PATH"] and found["OMP_NUM_THREADS"] == "1"

    path = tmp_path / "own.py"
    path.write_text("import os\ndef reward(completions):\n    return [float('HF_TOKEN' in os.environ)]\n")
    with CustomScorer(f"{path}:reward", workers=1, timeout_s=5) as scorer:
        assert results(scorer, "x") == [1.0]


def test_more_workers_than_the_machine_can_hold_are_refused_with_a_number_that_fits(monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    check_workers(2, cores=1, free_mib=2 * WORKER_MIB)
    check_workers(1, cores=1, free_mib=0)
    check_workers(64, cores=2, free_mib=None)
    fits = 2 * WORKERS_PER_CORE
    with pytest.raises(ScorerError, match=rf"reward.workers = 1000: too many for 2 cores.* at most {fits}$"):
        check_workers(1000, cores=2, free_mib=1 << 30)
    fits = 960 // WORKER_MIB
    with pytest.raises(ScorerError, match=rf"{32 * WORKER_MIB:,} MiB, and 960 MiB are free; .* at most {fits}$"):
        check_workers(32, cores=2, free_mib=960)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ScorerError, match=r"in each of 4 ranks: too many .* at most 16"):
        check_workers(17, cores=2)


def test_the_memory_of_a_container_counts_without_its_cache_of_files(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{100 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{95 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 7\nactive_file {30 << 20}\ninactive_file {15 << 20}\n")
    assert capacity._free_mib(tmp_path) == 50
    (tmp_path / "memory.max").write_text("max\n")
    assert capacity._free_mib(tmp_path) != 50
