"""The process on the other side of `or1.reward.pool`: `python -m or1.reward.worker FD MODULE:FUNCTION TIMEOUT_S`.

It loads FUNCTION(box, golds) -> bool once, then forks a child that calls it for one job after another. A child that
hangs is killed by its own kernel timer, and the next one is forked in milliseconds from this warm process, which has
one thread and thus may fork. It reads and writes the socket FD alone, so every job gets exactly one reply.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection

JOBS_PER_CHILD = 5000
"""Then a new child is forked, so that what sympy leaks stays bounded."""
MEMORY_LIMIT_BYTES = 2 << 30
"""Address space of a child: 10^{10^{10}} ends in a MemoryError instead of the machine's out-of-memory killer."""

Grader = Callable[[str, Sequence[str]], bool]


def main() -> None:
    """Announce readiness, then answer jobs until the other side closes the socket or dies."""
    descriptor, path, timeout = sys.argv[1:]
    # Ctrl-C is the trainer's to handle. SIGALRM must kill, even if the trainer was started with it ignored or blocked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    jobs = Connection(int(descriptor))
    module_name, _, function_name = path.partition(":")
    module = importlib.import_module(module_name)
    getattr(module, "warm_up", lambda: None)()
    children = _Children(getattr(module, function_name), float(timeout), jobs)
    with contextlib.suppress(EOFError, OSError):
        jobs.send_bytes(b"ready")
        while True:
            jobs.send_bytes(children.ask(jobs.recv_bytes()))


class _Children:
    """At most one living child, forked when needed."""

    def __init__(self, grader: Grader, timeout_s: float, jobs: Connection):
        self._grader, self._timeout_s, self._jobs = grader, timeout_s, jobs
        self._pid: int | None = None
        self._pipe: Connection | None = None
        self._asked = 0

    def ask(self, job: bytes) -> bytes:
        """The reply to one job: of the child if it lives to give one, else what killed it."""
        if self._pid is not None and (self._asked == JOBS_PER_CHILD or os.waitpid(self._pid, os.WNOHANG)[0]):
            self._retire()
        if self._pid is None:
            self._fork()
        self._asked += 1
        try:
            self._pipe.send_bytes(job)
            return self._pipe.recv_bytes()
        except (EOFError, OSError):
            return self._obituary()

    def _fork(self) -> None:
        self._pipe, theirs = Pipe()
        self._pid, self._asked = os.fork(), 0
        if self._pid == 0:
            self._pipe.close()
            self._jobs.close()
            _grade_jobs(theirs, self._grader, self._timeout_s)
        theirs.close()

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
            return json.dumps(["timeout", ""]).encode()
        cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return json.dumps(["crash", cause]).encode()


def _grade_jobs(pipe: Connection, grader: Grader, timeout_s: float) -> None:
    """The child's life. Ends at a closed pipe, never returns."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    try:
        while True:
            job = json.loads(pipe.recv_bytes())
            # The kernel's timer also ends code that holds the GIL, and a child whose trainer was killed.
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            reply = _reply(grader, job["box"], job["golds"])
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send_bytes(json.dumps(reply).encode())
    finally:
        os._exit(0)


def _reply(grader: Grader, box: str, golds: list[str]) -> tuple[str, str]:
    try:
        return ("ok" if grader(box, golds) else "wrong"), ""
    except Exception as error:  # noqa: BLE001  the process boundary: whatever a grader raises becomes a counted status
        return "crash", f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
