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

from or1.reward.base import RewardFunctionError, ScorerError
from or1.reward.worker import READY
from or1.types import Score, Status

START_LIMIT_S = 120.0
"""A worker that is not ready by then is given up; a cold network file system can take a minute."""
GRACE_S = 10.0
"""A worker ends a job at its time limit by itself; this much later the whole worker is replaced."""

_log = logging.getLogger(__name__)
_LOGGED_CRASHES = 5


class WorkerPool:
    """Processes that run one grader, and the futures of what they were given.

    grader              "module:function" of a function(job) -> Score or bool, run in the workers. The module may have
                        `warm_up()`, called once in each worker before it forks, and `begin(options)`, called in each
                        forked child before its first job; neither is charged to a job
    workers             processes
    options             for `begin`; plain JSON
    memory_limit_bytes  address space of a child; 0 is no limit
    memo_size           scores remembered, those of timeouts and crashes excepted; equal jobs that wait together are
                        then graded once. 0 grades every job
    unscored_faults     a job that times out or crashes has no reward (NaN) instead of 0

    Raises ScorerError if a worker cannot start, RewardFunctionError if `begin` fails.
    """

    def __init__(
        self,
        grader: str,
        *,
        workers: int,
        options: Mapping[str, Any] | None = None,
        memory_limit_bytes: int = 0,
        memo_size: int = 0,
        unscored_faults: bool = False,
    ):
        self._memo_size, self._fault_reward = memo_size, math.nan if unscored_faults else 0.0
        self._lock = threading.Lock()
        self._memo: OrderedDict[bytes, Score] = OrderedDict()
        self._running: dict[bytes, Future[Score]] = {}
        self._jobs: queue.SimpleQueue[tuple[bytes, float, str, Future[Score]] | None] = queue.SimpleQueue()
        self._closed = False
        self._crashes = 0
        arguments = [grader, json.dumps(dict(options or {})), str(memory_limit_bytes)]
        self._workers = [_Worker(arguments) for _ in range(workers)]
        self._threads: list[threading.Thread] = []
        try:
            for worker in self._workers:
                worker.launch()
            for worker in self._workers:
                worker.await_ready()
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
            _log.warning("grading %.300s crashed: %s", name or message.decode(), score.cause)
        future.set_result(score)


class _Worker:
    """One `or1.reward.worker` process and the socket to it. Used by one thread, except for `kill`."""

    def __init__(self, arguments: list[str]):
        self._arguments = arguments
        self._process: subprocess.Popen | None = None
        self._socket: Connection | None = None

    def launch(self) -> None:
        """Start the process, which takes about a second to be ready. Raises ScorerError if it cannot be started."""
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
                env=_worker_environment(),
            )
        except OSError as error:
            raise ScorerError(f"reward worker cannot be started ({error}): {' '.join(command)}") from error
        finally:
            theirs.close()

    def await_ready(self) -> None:
        """Wait until the process takes jobs.

        Raises ScorerError if it ends before or takes over START_LIMIT_S, RewardFunctionError with what `begin` raised.
        """
        try:
            if self._socket.poll(START_LIMIT_S):
                if (said := self._socket.recv_bytes()) == READY:
                    return
                raise RewardFunctionError(f"reward.kind: {said.decode()}")
            self.kill()
            fate = f"was not ready after {START_LIMIT_S:.0f} s"
        except (EOFError, OSError):
            fate = f"ended with code {self._process.wait()} before it was ready"
        raise ScorerError(f"reward worker {fate}; its own message stands above. `{sys.executable} -c "
                          f"'import {self._arguments[0].partition(':')[0]}'` must work: reinstall or1 if not")

    def ask(self, message: bytes, limit_s: float) -> tuple[Status, float | None, str]:
        """Status and reward of one job, and the cause of a crash. Replaces a dead worker first; never raises."""
        try:
            if self._process.poll() is not None:
                self.launch()
                self.await_ready()
            self._socket.send_bytes(str(limit_s).encode() + b" " + message)
            if not self._socket.poll(limit_s + GRACE_S):
                self.kill()
                return Status.TIMEOUT, None, ""
            status, reward, cause = json.loads(self._socket.recv_bytes())
            return Status(status), reward, cause
        except (EOFError, OSError, ValueError) as error:  # ValueError: half a reply
            self.kill()
            return Status.CRASH, None, f"the worker died ({type(error).__name__})"
        except ScorerError as error:
            return Status.CRASH, None, str(error)

    def kill(self) -> None:
        """Kill the process and its child, if they live."""
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended just now
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _worker_environment() -> dict[str, str]:
    """The trainer's import path, and one thread per library: a worker must be single-threaded to fork."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return os.environ | threads | {"PYTHONPATH": path}


def done(score: Score) -> Future[Score]:
    """A future that has its score."""
    future: Future[Score] = Future()
    future.set_result(score)
    return future
