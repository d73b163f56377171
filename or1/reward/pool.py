"""Grading in processes that can be killed: one slow, hanging or crashing answer costs its own slot and nothing else.

Each slot is one thread here and one `or1.reward.worker` process, joined by a socket. The worker is a fresh Python, not
a fork of the trainer (whose torch threads do not survive one) and not a multiprocessing child (which would run the
user's main script again). It lives in its own session, so Ctrl-C does not reach it, and ends when the socket closes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Self

from or1.core.errors import RewardFunctionError, ScorerError
from or1.core.processes import kill_descendants
from or1.core.text import visible
from or1.core.types import Score, Status
from or1.reward.child import NUMBER_BYTES
from or1.reward.worker import READY, WAIT

START_LIMIT_S = 120.0
"""A worker that is not ready by then is given up; a cold network file system can take a minute."""
GRACE_S = 10.0
"""A worker ends a job at its time limit by itself; this much later the whole worker is replaced."""

_log = logging.getLogger(__name__)
_LOGGED_CRASHES = 5
_STARTS = 3
_SHOWN_CAUSE = 2000
# What the maths verifier may need to find programs, libraries, folders and its language, and no token of the user's.
_PLAIN = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LANGUAGE",
    "TZ",
    "TMPDIR",
    "TEMP",
    "TMP",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "PYTHONHOME",
    "PYTHONHASHSEED",
    "PYTHONUTF8",
    "PYTHONIOENCODING",
    "PYTHONCOERCECLOCALE",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONPYCACHEPREFIX",
    "PYTHONNOUSERSITE",
    "PYTHONUSERBASE",
)


class WorkerPool:
    """Processes that run one grader, and the futures of what they were given.

    grader              "module:function" of a function(job) -> Score or bool, run in the workers. The module may have
                        `warm_up()`, called once in each worker before it forks, and `begin(options)`, called in each
                        forked child before its first job; neither is charged to a job
    workers             processes
    options             for `begin`; plain JSON
    memory_limit_bytes  of a child; 0 is no limit
    memory_kind         what is limited: AS, the address space, or DATA, the memory that a process can fill. Libraries
                        for GPUs reserve far more addresses than memory
    memo_size           scores remembered, those of timeouts and crashes excepted; equal jobs that wait together are
                        then graded once. 0 grades every job
    unscored_faults     a job that times out or crashes has no reward (NaN) instead of 0
    log                 file for what graders print; None: only their errors are shown, in the terminal
    plain_environment   keep variables that may hold tokens from the workers

    `about` is what `begin` returned. Raises ScorerError if a worker cannot start, RewardFunctionError if `begin` fails.
    """

    def __init__(
        self,
        grader: str,
        *,
        workers: int,
        options: Mapping[str, Any] | None = None,
        memory_limit_bytes: int = 0,
        memory_kind: str = "AS",
        memo_size: int = 0,
        unscored_faults: bool = False,
        log: str | os.PathLike[str] | None = None,
        plain_environment: bool = False,
    ):
        self._memo_size, self._fault_reward = memo_size, math.nan if unscored_faults else 0.0
        self._lock = threading.Lock()
        self._memo: OrderedDict[bytes, Score] = OrderedDict()
        self._running: dict[bytes, Future[Score]] = {}
        self._jobs: queue.SimpleQueue[tuple[bytes, float, str, Future[Score]] | None] = queue.SimpleQueue()
        self._closed = False
        self._crashes = 0
        place = "" if log is None else os.path.abspath(log)
        arguments = [grader, json.dumps(dict(options or {})), f"{memory_limit_bytes} {memory_kind}", place]
        self._workers = [_Worker(arguments, plain_environment) for _ in range(workers)]
        self.about: Any = None
        self._threads: list[threading.Thread] = []
        try:
            for worker in self._workers:
                worker.launch()
            for worker in self._workers:
                self.about = worker.await_ready()
        except ScorerError:
            self.close()
            raise
        for worker in self._workers:
            self._threads.append(threading.Thread(target=self._serve, args=(worker,), name="or1-reward", daemon=True))
            self._threads[-1].start()

    def submit(self, job: Mapping[str, Any], limit_s: float, name: str = "") -> Future[Score]:
        """Start grading one job, JSON but for values that str() then makes so; limit_s counts from when it starts.

        name  what a report of a crash calls the job; by default its JSON

        Raises RuntimeError after `close`.
        """
        message = json.dumps(job, default=str).encode()
        with self._lock:
            if self._closed:
                raise RuntimeError("the scorer is closed; make a new one with or1.reward.make_scorer")
            if message in self._memo:
                self._memo.move_to_end(message)
                return done(self._memo[message])
            if message in self._running:
                return self._running[message]
            future: Future[Score] = Future()
            future.set_running_or_notify_cancel()
            if self._memo_size:
                self._running[message] = future
            self._jobs.put((message, limit_s, name, future))
        return future

    def close(self) -> None:
        """Stop at once: what still waits becomes Status.CRASH. Workers are dead when it returns."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            # Again and again, because a thread may just now be replacing a worker.
            while thread.is_alive():
                for worker in self._workers:
                    worker.kill()
                thread.join(0.05)
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, worker: _Worker) -> None:
        while (item := self._jobs.get()) is not None:
            message, limit_s, name, future = item
            if self._closed:
                status, reward, cause = Status.CRASH, None, "the scorer was closed"
            else:
                status, reward, cause = worker.ask(message, limit_s)
            if status in (Status.TIMEOUT, Status.CRASH) and reward is None:
                reward = self._fault_reward
            self._finish(message, name, future, Score(math.nan if reward is None else reward, status, cause))

    def _finish(self, message: bytes, name: str, future: Future[Score], score: Score) -> None:
        with self._lock:
            self._running.pop(message, None)
            if self._memo_size and score.status not in (Status.TIMEOUT, Status.CRASH):
                self._memo[message] = score
                if len(self._memo) > self._memo_size:
                    self._memo.popitem(last=False)
            self._crashes += score.status is Status.CRASH
            report = score.status is Status.CRASH and self._crashes <= _LOGGED_CRASHES and not self._closed
        if report:
            _log.warning("grading %.300s crashed: %.*s", visible(name or message.decode()), _SHOWN_CAUSE, score.cause)
        future.set_result(score)


class _Worker:
    """One `or1.reward.worker` process and the socket to it. Used by one thread, except for `kill`."""

    def __init__(self, arguments: list[str], plain_environment: bool):
        self._arguments, self._plain_environment = arguments, plain_environment
        self._process: subprocess.Popen | None = None
        self._socket: Connection | None = None

    def launch(self) -> None:
        """Start the process, which takes about a second to be ready. Raises ScorerError if it cannot be started."""
        if self._socket is not None:
            self._socket.close()
        self._socket, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "or1.reward.worker"]
        command += [str(theirs.fileno()), *self._arguments]
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_worker_environment(self._plain_environment),
            )
        except OSError as error:
            raise ScorerError(f"reward worker cannot be started ({error}): {' '.join(command)}") from error
        finally:
            theirs.close()

    def await_ready(self, starts: int = _STARTS) -> Any:
        """Wait until the process takes jobs. Return what `begin` returned.

        A process that is killed before that is started again, `starts` times in all.
        Raises ScorerError if it ends before or takes over START_LIMIT_S, RewardFunctionError with what `begin` raised.
        """
        try:
            if self._socket.poll(START_LIMIT_S):
                if (said := self._socket.recv_bytes()).startswith(READY):
                    return json.loads(said.removeprefix(READY))
                raise RewardFunctionError(f"reward.kind: {visible(said.decode())}")
            self.kill()
            fate = f"was not ready after {START_LIMIT_S:.0f} s"
            if path := json.loads(self._arguments[1]).get("path"):
                raise RewardFunctionError(f"reward.kind: {path} {fate}; its module must be imported in that time")
        except (EOFError, OSError):
            # Killed from outside, by the kernel out of memory for example: the next one may live.
            if (code := self._process.wait()) == -signal.SIGKILL and starts > 1:
                self.launch()
                return self.await_ready(starts - 1)
            fate = f"ended with code {code} before it was ready"
        raise ScorerError(
            f"reward worker {fate}; its own message stands above. `{sys.executable} -c "
            f"'import {self._arguments[0].partition(':')[0]}'` must work: reinstall or1 if not"
        )

    def ask(self, message: bytes, limit_s: float) -> tuple[Status, float | None, str]:
        """Status and reward of one job, and the cause of a crash. Replaces a dead worker first; never raises."""
        number = secrets.token_bytes(NUMBER_BYTES)
        try:
            if self._has_ended():
                self.kill()
                self.launch()
                self.await_ready()
            self._socket.send_bytes(number + str(limit_s).encode() + b" " + message)
            said, patience_s = number + WAIT, limit_s + GRACE_S
            while said == number + WAIT:
                if not self._socket.poll(patience_s):
                    self.kill()
                    return Status.TIMEOUT, None, ""
                said, patience_s = self._socket.recv_bytes(), START_LIMIT_S + limit_s + GRACE_S
            if not said.startswith(number):
                raise ValueError("a reply to another job")
            status, reward, cause = json.loads(said.removeprefix(number))
            return Status(status), reward, visible(cause)
        except (EOFError, OSError, ValueError, TypeError) as error:  # the last two: half a reply, or none to this job
            self.kill()
            return Status.CRASH, None, f"the worker died ({type(error).__name__})"
        except ScorerError as error:
            return Status.CRASH, None, str(error)

    def kill(self) -> None:
        """Kill the process and all that it started, if they live."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        # Those in other sessions first: once the worker is gone nobody knows whose they were.
        killed = kill_descendants(process.pid)
        # A dead worker that has not been waited for still holds its number, so the group cannot be another's.
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended just now
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pid in killed:
            # Where this process is the first of a container, orphans are its own to reap.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def _has_ended(self) -> bool:
        if self._process.returncode is not None:
            return True
        if not hasattr(os, "waitid"):
            return self._process.poll() is not None
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return self._process.poll() is not None


def _worker_environment(plain: bool) -> dict[str, str]:
    """The trainer's import path, and one thread per library: a worker must be single-threaded to fork."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    kept = {n: v for n, v in os.environ.items() if not plain or n in _PLAIN or n.startswith("LC_")}
    return kept | threads | {"PYTHONPATH": path}


def done(score: Score) -> Future[Score]:
    """A future that has its score."""
    future: Future[Score] = Future()
    future.set_result(score)
    return future
