"""A pool of grading processes that can be killed: a slow, hanging or crashing answer blocks one worker only.

Each worker is one thread here and one `or1.reward.worker` process, joined by a socket. The process is a fresh Python.
A fork of the trainer would deadlock, since torch's threads do not survive a fork. A multiprocessing child would run
the user's main script again. The process has its own session, so Ctrl-C does not reach it. It ends when the socket
closes.
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
from typing import Any, Self

from or1.core.errors import RewardFunctionError, ScorerError
from or1.core.processes import kill_descendants
from or1.core.text import visible
from or1.core.types import Score, Status
from or1.reward.child import NUMBER_BYTES
from or1.reward.scorer import scored
from or1.reward.worker import READY, WAIT

START_LIMIT_S = 120.0
"""Seconds until a worker must be ready. A cold network file system can take a minute."""
GRACE_S = 10.0
"""Seconds after a job's time limit at which the pool kills the worker, which should have ended the job itself."""

_log = logging.getLogger(__name__)
_LOGGED_CRASHES = 5
_STARTS = 3
"""Attempts to start a worker that the system kills before it is ready."""
_SHOWN_CAUSE = 2000
# All that the maths verifier needs to find programs, libraries, folders and its language. None of these holds a secret.
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
    """Worker processes that run one grader, and the queue of jobs for them.

    grader              "module:function" of a function(job) -> Score or bool, which runs in the workers. The module may
                        define `warm_up()`, called once in each worker before it forks, and `begin(options)`, called in
                        each forked child before its first job. Neither counts towards the time limit of a job
    workers             number of processes
    options             argument of `begin`; plain JSON
    memory_limit_bytes  limit for one child; 0: no limit
    memory_kind         "AS" limits the address space, "DATA" the writable memory. GPU libraries reserve far more
                        addresses than memory
    memo_size           number of scores to cache, except timeouts and crashes; equal jobs in flight are then graded
                        once. 0: grade every job
    unscored_faults     a timeout or crash gives no reward (NaN) instead of 0
    log                 file for the output of graders; None: only stderr is shown, in the terminal
    plain_environment   give the workers a short list of environment variables, none of which holds a secret

    `about` is the return value of `begin`. Raises ScorerError if a worker cannot start, RewardFunctionError if `begin`
    fails.
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
        self._workers: list[_Worker] = []
        self.about: Any = None
        self._threads: list[threading.Thread] = []
        try:
            # Start all before waiting for the first, since each takes about a second.
            for _ in range(workers):
                self._workers.append(_Worker(arguments, plain_environment))
            for worker in self._workers:
                self.about = worker.await_ready()
        except ScorerError:
            self.close()
            raise
        for worker in self._workers:
            self._threads.append(threading.Thread(target=self._serve, args=(worker,), name="or1-reward", daemon=True))
            self._threads[-1].start()

    def submit(self, job: Mapping[str, Any], limit_s: float, name: str = "") -> Future[Score]:
        """Queue one job and return the future of its score.

        job      JSON; str() converts any other value
        limit_s  time limit in seconds, from the start of grading
        name     name of the job in the log of a crash; default: its JSON

        Raises RuntimeError after `close`.
        """
        message = json.dumps(job, default=str).encode()
        with self._lock:
            if self._closed:
                raise RuntimeError("the scorer is closed; make a new one with or1.reward.make_scorer")
            if message in self._memo:
                self._memo.move_to_end(message)
                return scored(self._memo[message])
            if message in self._running:
                return self._running[message]
            future: Future[Score] = Future()
            future.set_running_or_notify_cancel()
            if self._memo_size:
                self._running[message] = future
            self._jobs.put((message, limit_s, name, future))
        return future

    def close(self) -> None:
        """Stop immediately: waiting jobs get Status.CRASH. All workers are dead on return."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            # In a loop, because a thread may be replacing its process at this moment.
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
    """A place for one process, which is replaced when it dies. Used by one thread, except for `kill`."""

    def __init__(self, arguments: list[str], plain_environment: bool):
        self._arguments, self._plain_environment = arguments, plain_environment
        self._process = _Process(arguments, plain_environment)

    def await_ready(self) -> Any:
        """Wait until the process takes jobs. Return the result of `begin`.

        A process that the system kills first, for example out of memory, is started again up to _STARTS times in all.

        Raises ScorerError if the process ends or takes over START_LIMIT_S, RewardFunctionError if `begin` fails.
        """
        code = 0
        for start in range(_STARTS):
            if start:
                self._replace()
            try:
                return self._process.await_ready()
            except (EOFError, OSError):
                code = self._process.wait()
            if code != -signal.SIGKILL:
                break
        raise _start_error(f"ended with code {code} before it was ready", self._arguments)

    def ask(self, message: bytes, limit_s: float) -> tuple[Status, float | None, str]:
        """Return status and reward of one job, and the cause of a crash. Never raise. Replace a dead process first."""
        try:
            try:
                return self._ask_living(message, limit_s)
            except BrokenPipeError:
                # The process died before it took the job, and was not seen to be dead yet.
                self.kill()
                return self._ask_living(message, limit_s)
        except ScorerError as error:
            self.kill()
            return Status.CRASH, None, str(error)
        except (EOFError, OSError, ValueError, TypeError) as error:  # the last two: half a reply, or one to another job
            self.kill()
            return Status.CRASH, None, f"the worker died ({type(error).__name__})"

    def _ask_living(self, message: bytes, limit_s: float) -> tuple[Status, float | None, str]:
        if self._process.has_ended():
            self._replace()
            self.await_ready()
        return self._process.ask(message, limit_s)

    def kill(self) -> None:
        """Kill the process and all its descendants. No-op if it has ended."""
        self._process.kill()

    def _replace(self) -> None:
        self._process.kill()
        self._process.socket.close()
        self._process = _Process(self._arguments, self._plain_environment)


class _Process:
    """One running `or1.reward.worker` process and the socket to it. Raises ScorerError if it cannot be started."""

    def __init__(self, arguments: list[str], plain_environment: bool):
        self._arguments = arguments
        self.socket, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "or1.reward.worker", str(theirs.fileno()), *arguments]
        try:
            self._popen = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_worker_environment(plain_environment),
            )
        except OSError as error:
            self.socket.close()
            raise ScorerError(f"reward worker cannot be started ({error}): {' '.join(command)}") from error
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def await_ready(self) -> Any:
        """Return the result of `begin` in the process.

        Raises EOFError or OSError if the process ends first, ScorerError if it takes over START_LIMIT_S, and
        RewardFunctionError if `begin` fails.
        """
        if self.socket.poll(START_LIMIT_S):
            if (reply := self.socket.recv_bytes()).startswith(READY):
                return json.loads(reply.removeprefix(READY))
            raise RewardFunctionError(f"reward.kind: {visible(reply.decode())}")
        self.kill()
        fate = f"was not ready after {START_LIMIT_S:.0f} s"
        if path := json.loads(self._arguments[1]).get("path"):
            raise RewardFunctionError(f"reward.kind: {path} {fate}; its module must be imported in that time")
        raise _start_error(fate, self._arguments)

    def ask(self, message: bytes, limit_s: float) -> tuple[Status, float | None, str]:
        """Return status and reward of one job, and the cause of a crash.

        Raises EOFError or OSError if the process dies, ValueError or TypeError if its reply is not to this job.
        """
        number = secrets.token_bytes(NUMBER_BYTES)
        self.socket.send_bytes(number + str(limit_s).encode() + b" " + message)
        reply, patience_s = number + WAIT, limit_s + GRACE_S
        while reply == number + WAIT:
            if not self.socket.poll(patience_s):
                self.kill()
                return Status.TIMEOUT, None, ""
            reply, patience_s = self.socket.recv_bytes(), START_LIMIT_S + limit_s + GRACE_S
        if not reply.startswith(number):
            raise ValueError("a reply to another job")
        status, reward, cause = json.loads(reply.removeprefix(number))
        return Status(status), reward, visible(cause)

    def kill(self) -> None:
        """Kill the process and all its descendants, and reap them. No-op if it has ended."""
        if self._popen.returncode is not None:
            return
        # Descendants in other sessions first: after the worker's death their parent is lost.
        killed = kill_descendants(self.pid)
        # Until it is reaped, a dead worker keeps its process id, so the group cannot belong to another process.
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended just now
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        for pid in killed:
            # If this process is process 1 of a container, it must reap the orphans itself.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def has_ended(self) -> bool:
        """Return True if the process is dead, without reaping it."""
        if self._popen.returncode is not None:
            return True
        if not hasattr(os, "waitid"):
            return self._popen.poll() is not None
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return self._popen.poll() is not None

    def wait(self) -> int:
        """Wait for the end of the process and return its exit code, -N for signal N."""
        return self._popen.wait()


def _start_error(fate: str, arguments: list[str]) -> ScorerError:
    return ScorerError(
        f"reward worker {fate}; its own error is printed above. `{sys.executable} -c "
        f"'import {arguments[0].partition(':')[0]}'` must work: reinstall or1 if not"
    )


def _worker_environment(plain: bool) -> dict[str, str]:
    """Return the environment of a worker: the trainer's import path, and one thread per library so that it may fork."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    kept = {n: v for n, v in os.environ.items() if not plain or n in _PLAIN or n.startswith("LC_")}
    return kept | threads | {"PYTHONPATH": path}
