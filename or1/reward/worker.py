"""The process on the other side of `or1.reward.pool`: `python -m or1.reward.worker FD MODULE:FUNCTION OPTIONS MEMORY`.

It loads FUNCTION(job) once, then forks a child that calls it for one job after another. A child that hangs is killed
by its own kernel timer, and the next one is forked in milliseconds from this warm process, which has one thread and
thus may fork. It reads and writes the socket FD alone, so every job gets exactly one reply.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from or1.types import Score

JOBS_PER_CHILD = 5000
"""Then a new child is forked, so that what sympy leaks stays bounded."""

_OWN = (os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep, "<frozen ")
_LIBRARIES = (sys.prefix + os.sep, sys.base_prefix + os.sep)

READY = b"ready"
"""The first message of a worker that takes jobs; of one that does not, it is what `begin` raised."""

Job = dict[str, Any]
Grader = Callable[[Job], Score | bool]


def main() -> None:
    """Announce readiness, then answer jobs until the other side closes the socket or dies."""
    descriptor, path, options, memory = sys.argv[1:]
    # Ctrl-C is the trainer's to handle. SIGALRM must kill, even if the trainer was started with it ignored or blocked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    jobs = Connection(int(descriptor))
    module_name, _, function_name = path.partition(":")
    module = importlib.import_module(module_name)
    getattr(module, "warm_up", lambda: None)()
    begin = getattr(module, "begin", lambda options: None)

    def prepare() -> None:
        _limit_memory(int(memory))
        begin(json.loads(options))

    children = _Children(getattr(module, function_name), prepare, jobs)
    with contextlib.suppress(EOFError, OSError):
        # The first child shows whether `begin` works at all.
        problem = children.fork()
        jobs.send_bytes(problem or READY)
        if problem:
            return
        while True:
            jobs.send_bytes(children.ask(jobs.recv_bytes()))


class _Children:
    """At most one living child, forked when needed."""

    def __init__(self, grader: Grader, prepare: Callable[[], None], jobs: Connection):
        self._grader, self._prepare, self._jobs = grader, prepare, jobs
        self._pid: int | None = None
        self._pipe: Connection | None = None
        self._asked = 0

    def ask(self, job: bytes) -> bytes:
        """The reply to one job: of the child if it lives to give one, else what killed it."""
        if self._pid is not None and (self._asked == JOBS_PER_CHILD or os.waitpid(self._pid, os.WNOHANG)[0]):
            self._retire()
        self._asked += 1
        try:
            if self._pid is None and (problem := self.fork()):
                return json.dumps(["crash", None, problem.decode()]).encode()
            self._pipe.send_bytes(job)
            return self._pipe.recv_bytes()
        except (EOFError, OSError):
            return self._obituary()

    def fork(self) -> bytes:
        """Make a child and wait until it is prepared; returns why it is not, or nothing. Raises EOFError if it died."""
        self._pipe, theirs = Pipe()
        self._pid, self._asked = os.fork(), 0
        if self._pid == 0:
            self._pipe.close()
            self._jobs.close()
            _grade_jobs(theirs, self._grader, self._prepare)
        theirs.close()
        said = self._pipe.recv_bytes()
        if said == READY:
            return b""
        self._retire()
        return said

    def _retire(self) -> None:
        self._pipe.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        self._pid = None

    def _obituary(self) -> bytes:
        self._pipe.close()
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._pid = None
        if code == -signal.SIGALRM:
            return json.dumps(["timeout", None, ""]).encode()
        cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return json.dumps(["crash", None, cause]).encode()


def _grade_jobs(pipe: Connection, grader: Grader, prepare: Callable[[], None]) -> None:
    """The child's life. Ends at a closed pipe, never returns."""
    code = 1
    try:
        problem = _prepared(prepare)
        pipe.send_bytes(problem or READY)
        while not problem:
            limit_s, _, job = pipe.recv_bytes().partition(b" ")
            # The kernel's timer also ends code that holds the GIL, and a child whose trainer was killed.
            signal.setitimer(signal.ITIMER_REAL, float(limit_s))
            reply = _reply(grader, json.loads(job))
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send_bytes(json.dumps(reply).encode())
        code = 0
    except (EOFError, OSError):
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def _prepared(prepare: Callable[[], None]) -> bytes:
    try:
        prepare()
    except Exception as error:  # noqa: BLE001  the process boundary: the other side raises it in its own words
        return cause_of(error).encode()
    return b""


def cause_of(error: Exception) -> str:
    """An error with the last place in the user's own code, else in a library; or1's messages say enough themselves."""
    if type(error).__module__.startswith("or1."):
        return str(error)
    name = type(error).__name__
    text = f"{name}: {error}" if str(error) else name
    others = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OWN)]
    places = [f for f in others if not f.filename.startswith(_LIBRARIES)] or others
    return f"{text} ({places[-1].filename}:{places[-1].lineno}, in {places[-1].name})" if places else text


def _limit_memory(limit: int) -> None:
    """Of the address space: 10^{10^{10}} ends in a MemoryError instead of the machine's out-of-memory killer."""
    if limit:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _reply(grader: Grader, job: Job) -> tuple[str, float | None, str]:
    try:
        verdict = grader(job)
    except Exception as error:  # noqa: BLE001  the process boundary: whatever a grader raises becomes a counted status
        return "crash", None, cause_of(error)
    if isinstance(verdict, Score):
        # JSON has no NaN; None is a response without a reward.
        return verdict.status.value, verdict.reward if math.isfinite(verdict.reward) else None, ""
    return ("ok", 1.0, "") if verdict else ("wrong", 0.0, "")


if __name__ == "__main__":
    main()
