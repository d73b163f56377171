"""Scoring in processes that can be killed: one slow, hanging or crashing answer costs its own slot and nothing else.

Each slot is one thread here and one `or1.reward.worker` process, joined by a socket. The worker is a fresh Python, not
a fork of the trainer (whose torch threads do not survive one) and not a multiprocessing child (which would run the
user's main script again). It lives in its own session, so Ctrl-C does not reach it, and ends when the socket closes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import Future
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Self

from or1.reward import math
from or1.reward.base import ScorerError
from or1.types import Prompt, Response, Score, Status

START_LIMIT_S = 120.0
"""A worker that is not ready by then is given up; a cold network file system can take a minute."""
GRACE_S = 10.0
"""A worker ends a job at its time limit by itself; this much later the whole worker is replaced."""

_Key = tuple[tuple[str, ...], str]
_log = logging.getLogger(__name__)
_LOGGED_CRASHES = 5


class PoolScorer:
    r"""The math verifier as a `Scorer`.

    Truncated responses, responses without \boxed{} and answers that string or integer comparison decides are scored
    in the caller; the others go to the workers, equal ones once.

    workers              processes
    timeout_s            limit for one answer from the moment its grading starts; then Status.TIMEOUT
    require_think_close  a response without `</think>` is Status.TRUNCATED
    grader               "module:function" of a function(box, golds) -> bool, run in the workers; a `warm_up()` in the
                         same module is called before the first job
    memo_size            answers remembered; those that timed out or crashed are not

    Raises ScorerError if a worker cannot start.
    """

    def __init__(
        self,
        *,
        workers: int,
        timeout_s: float,
        require_think_close: bool = False,
        grader: str = "or1.reward.math:equivalent",
        memo_size: int = 100_000,
    ):
        self._require_think_close, self._memo_size = require_think_close, memo_size
        self._lock = threading.Lock()
        self._memo: OrderedDict[_Key, Score] = OrderedDict()
        self._running: dict[_Key, Future[Score]] = {}
        self._jobs: queue.SimpleQueue[_Key | None] = queue.SimpleQueue()
        self._closed = False
        self._crashes = 0
        self._workers = [_Worker(grader, timeout_s) for _ in range(workers)]
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

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        """See `Scorer.submit`. Raises RuntimeError after `close`."""
        if response.truncated:
            return _done(math.make_score(Status.TRUNCATED))
        found = math.screen(response.text, prompt.golds, require_think_close=self._require_think_close)
        if isinstance(found, Score):
            return _done(found)
        return self._enqueue((prompt.golds, found))

    def close(self) -> None:
        """See `Scorer.close`. Workers are dead when it returns."""
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

    def _enqueue(self, key: _Key) -> Future[Score]:
        with self._lock:
            if self._closed:
                raise RuntimeError("the scorer is closed; make a new one with or1.reward.make_scorer")
            if key in self._memo:
                self._memo.move_to_end(key)
                return _done(self._memo[key])
            if key in self._running:
                return self._running[key]
            future: Future[Score] = Future()
            future.set_running_or_notify_cancel()
            self._running[key] = future
            self._jobs.put(key)
        return future

    def _serve(self, worker: _Worker) -> None:
        while (key := self._jobs.get()) is not None:
            golds, box = key
            status, cause = (Status.CRASH, "the scorer was closed") if self._closed else worker.ask(golds, box)
            self._finish(key, math.make_score(status), cause)

    def _finish(self, key: _Key, score: Score, cause: str) -> None:
        with self._lock:
            future = self._running.pop(key)
            if score.status in (Status.OK, Status.WRONG):
                self._memo[key] = score
                if len(self._memo) > self._memo_size:
                    self._memo.popitem(last=False)
            self._crashes += score.status is Status.CRASH
            report = score.status is Status.CRASH and self._crashes <= _LOGGED_CRASHES and not self._closed
        if report:
            _log.warning("grading %.200r against %.200r crashed: %s", key[1], key[0], cause)
        future.set_result(score)


class _Worker:
    """One `or1.reward.worker` process and the socket to it. Used by one thread, except for `kill`."""

    def __init__(self, grader: str, timeout_s: float):
        self._grader, self._timeout_s = grader, timeout_s
        self._process: subprocess.Popen | None = None
        self._socket: Connection | None = None

    def launch(self) -> None:
        """Start the process, which takes about a second to be ready. Raises ScorerError if it cannot be started."""
        self._socket, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "or1.reward.worker"]
        command += [str(theirs.fileno()), self._grader, str(self._timeout_s)]
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
        """Wait until the process takes jobs. Raises ScorerError if it ends before or takes over START_LIMIT_S."""
        try:
            if self._socket.poll(START_LIMIT_S):
                self._socket.recv_bytes()
                return
            self.kill()
            fate = f"was not ready after {START_LIMIT_S:.0f} s"
        except (EOFError, OSError):
            fate = f"ended with code {self._process.wait()} before it was ready"
        raise ScorerError(f"reward worker {fate}; its own message stands above. `{sys.executable} -c "
                          f"'import {self._grader.partition(':')[0]}, math_verify'` must work: reinstall or1 if not")

    def ask(self, golds: tuple[str, ...], box: str) -> tuple[Status, str]:
        """The verdict on one answer, and the cause of a crash. Replaces a dead worker first; never raises."""
        try:
            if self._process.poll() is not None:
                self.launch()
                self.await_ready()
            self._socket.send_bytes(json.dumps({"golds": golds, "box": box}).encode())
            if not self._socket.poll(self._timeout_s + GRACE_S):
                self.kill()
                return Status.TIMEOUT, ""
            status, cause = json.loads(self._socket.recv_bytes())
            return Status(status), cause
        except (EOFError, OSError, ValueError) as error:  # ValueError: half a reply
            self.kill()
            return Status.CRASH, f"the worker died ({type(error).__name__})"
        except ScorerError as error:
            return Status.CRASH, str(error)

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


def _done(score: Score) -> Future[Score]:
    future: Future[Score] = Future()
    future.set_result(score)
    return future
