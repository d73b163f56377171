"""The process on the other side of `or1.reward.pool`.

    python -m or1.reward.worker FD MODULE:FUNCTION OPTIONS "BYTES AS|DATA" LOG

It loads FUNCTION(job) once, then forks a child that calls it for one job after another. A child that hangs is killed,
and the next one is forked in milliseconds from this warm process, which has one thread and thus may fork. What the
child does cannot reach the trainer's socket: this process answers every job, with exactly one reply.

Every job and every reply carries a number that is drawn for it. What a forked copy of the function or the function
itself writes into the pipe has no such number: it ends the child and is a crash, and never becomes the reward of any
job. That holds for mistakes. A function that searches its own process for the number can find it, for it runs there.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import resource
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from or1.core.processes import adopt_orphans, has_children, kill_descendants, reap_orphans
from or1.reward.child import NUMBER_BYTES, OVER, Work, encoded, framed, live, parsed
from or1.reward.output import OutputLog

JOBS_PER_CHILD = 5000
"""Then a new child is forked, so that what sympy leaks stays bounded."""
READY, WAIT = b"ready ", b"wait"
"""READY and what `begin` told as JSON is the first message of a worker; else it is why there will be no other.
WAIT says of a job that a new child is being prepared for it, which may take as long as the first one did."""

# Later than the child's own timer by what a busy machine may need to deliver a signal.
_GRACE_S = 4.0
_MAX_REPLY = 1 << 16
_LIMITS = {"AS": resource.RLIMIT_AS, "DATA": resource.RLIMIT_DATA}


class _TrainerGone(Exception):
    """The other side of the socket ended or closed it."""


class _ChildLost(Exception):
    """The child gave no reply that can be taken: the status and the cause of its job."""


def main() -> None:
    """Announce readiness, then answer jobs until the other side closes the socket or dies."""
    descriptor, path, options, memory, log = sys.argv[1:]
    # Ctrl-C is the trainer's to handle. SIGALRM must kill, even if the trainer was started with it ignored or blocked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    adopt_orphans()
    jobs = Connection(int(descriptor))
    module_name, _, function_name = path.partition(":")
    module = importlib.import_module(module_name)
    getattr(module, "warm_up", lambda: None)()
    begin = getattr(module, "begin", lambda options: None)
    limit, _, kind = memory.partition(" ")

    def prepare() -> Any:
        if int(limit):
            # 10^{10^{10}} ends in a MemoryError instead of the machine's out-of-memory killer.
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(_LIMITS[kind], (int(limit), int(limit)))
        return begin(json.loads(options))

    name = json.loads(options).get("path", path)
    children = _Children(getattr(module, function_name), prepare, jobs, OutputLog(log) if log else None, name)
    try:
        with contextlib.suppress(EOFError, OSError, _TrainerGone):
            children.serve()
    finally:
        children.end()
    # Where there is no /proc to find descendants in, at least the group ends.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


class _Children:
    """At most one living child, forked when needed.

    name  what the grader is called where it cannot be loaded
    """

    def __init__(
        self,
        grader: Callable[[dict[str, Any]], Any],
        prepare: Callable[[], Any],
        jobs: Connection,
        log: OutputLog | None,
        name: str,
    ):
        self._grader, self._prepare, self._name = grader, prepare, name
        self._jobs, self._log = jobs, log
        self._pid: int | None = None
        self._pidfd: int | None = None
        self._pipe: socket.socket | None = None
        self._asked = 0

    def serve(self) -> None:
        """Answer jobs. Raises EOFError, OSError or _TrainerGone when the other side has ended."""
        # The first child shows whether `begin` works at all.
        problem, told = self._fork()
        self._jobs.send_bytes(problem.encode("utf-8", "replace") if problem else READY + told)
        while not problem:
            while self._jobs.fileno() not in self._wait({self._jobs.fileno(): select.POLLIN}, math.inf):
                pass
            number, limit_s, job = parsed(self._jobs.recv_bytes())
            self._jobs.send_bytes(number + self._ask(number, limit_s, job))

    def end(self) -> int:
        """Kill the child and all that it started, and reap them; returns the child's exit code, -N for signal N."""
        code = 0
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):  # a dead one keeps its status
                os.kill(self._pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            self._pipe.close()
            if self._pidfd is not None:
                os.close(self._pidfd)
        self._pid = self._pidfd = self._pipe = None
        if has_children():
            kill_descendants(os.getpid())
            reap_orphans()
        if self._log is not None:
            self._log.close()
        return code

    def _ask(self, number: bytes, limit_s: float, job: bytes) -> bytes:
        """The reply to one job: of the child if it lives to give one, else what became of it."""
        reap_orphans(but=self._pid)
        if self._pid is not None and (self._asked == JOBS_PER_CHILD or self._has_ended()):
            self.end()
        if self._pid is None:
            self._jobs.send_bytes(number + WAIT)
            problem, _ = self._fork()
            if problem:
                return encoded("crash", None, problem)
        self._asked += 1
        # A number of its own: the trainer's is never in the child's memory.
        own = secrets.token_bytes(NUMBER_BYTES)
        try:
            said = self._exchange(own, own + str(limit_s).encode() + b" " + job, limit_s + _GRACE_S)
        except _ChildLost as lost:
            return encoded(*self._obituary(lost))
        if said[:1] == OVER:
            self.end()
        elif self._log is not None:
            self._log.end_line()
        return said[1:]

    def _fork(self) -> tuple[str, bytes]:
        """Make a child and wait until it is prepared: why it is not, or what its `begin` told as JSON."""
        self._pipe, theirs = socket.socketpair()
        output = self._log.open() if self._log is not None else None
        number, worker = secrets.token_bytes(NUMBER_BYTES), os.getpid()
        self._pid, self._asked = os.fork(), 0
        if self._pid == 0:
            self._pipe.close()
            self._jobs.close()
            live(theirs, worker, output, Work(self._grader, self._prepare, number))
        theirs.close()
        if output is not None:
            os.close(output)
        with contextlib.suppress(AttributeError, OSError):  # Linux before 5.3, or no Linux
            self._pidfd = os.pidfd_open(self._pid)
        self._pipe.setblocking(False)
        try:
            said = self._exchange(number, b"", math.inf)
        except _ChildLost as lost:
            cause = self._obituary(lost)[2]
            return f"{self._name} cannot be loaded: its process ended on the way ({cause})", b""
        if said[:1] != OVER:
            return "", said[1:]
        self.end()
        return said[1:].decode("utf-8", "replace"), b""

    def _exchange(self, number: bytes, message: bytes, limit_s: float) -> bytes:
        """Send a message, if there is one, to the child; returns what it says under this number.

        Raises _ChildLost, and _TrainerGone as soon as the trainer has ended, whatever the child is doing.
        """
        deadline = time.monotonic() + limit_s
        waiting, got, is_open = memoryview(framed(message) if message else b""), bytearray(), True
        jobs, pipe = self._jobs.fileno(), self._pipe.fileno()
        while True:
            wanted = {jobs: select.POLLIN}
            if is_open:
                wanted[pipe] = select.POLLIN | (select.POLLOUT if waiting else 0)
            if self._pidfd is not None:
                wanted[self._pidfd] = select.POLLIN
            ready = self._wait(wanted, deadline)
            if jobs in ready:  # no job comes before this one is answered
                raise _TrainerGone
            if pipe in ready:
                with contextlib.suppress(OSError):
                    waiting = waiting[self._pipe.send(waiting) :] if waiting else waiting
                is_open = self._receive(got)
            if (said := _reply_in(got, number)) is not None:
                return said
            if self._has_ended() if self._pidfd is not None else not is_open:
                if self._receive(got) and (said := _reply_in(got, number)) is not None:
                    return said
                raise _ChildLost("", "")
            if time.monotonic() > deadline:
                raise _ChildLost("timeout", "")

    def _receive(self, got: bytearray) -> bool:
        """Add to `got` what the pipe has; returns whether it is still open."""
        try:
            while len(got) <= _MAX_REPLY:
                if not (data := self._pipe.recv(1 << 16)):
                    return False
                got += data
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def _wait(self, wanted: dict[int, int], deadline: float) -> set[int]:
        """Wait until one of the descriptors is ready or the deadline is near; takes over what the child prints."""
        poll = select.poll()
        for descriptor, events in wanted.items():
            poll.register(descriptor, events)
        log = self._log.fileno() if self._log is not None else None
        if log is not None:
            poll.register(log, select.POLLIN)
        left_s = min(deadline - time.monotonic(), 3600.0)
        ready = {descriptor for descriptor, _ in poll.poll(max(left_s, 0.0) * 1000 + 1)}
        if log in ready:
            self._log.drain()
        return ready - {log}

    def _has_ended(self) -> bool:
        """Whether the child is dead; its status stays for `end`."""
        if not hasattr(os, "waitid"):
            return os.waitpid(self._pid, os.WNOHANG)[0] != 0
        return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _obituary(self, lost: _ChildLost) -> tuple[str, float | None, str]:
        """Status, reward and cause of the job at which the child was lost."""
        (status, cause), code = lost.args, self.end()
        if status:
            return status, None, cause
        if code == -signal.SIGALRM:
            return "timeout", None, ""
        return "crash", None, f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _reply_in(got: bytearray, number: bytes) -> bytes | None:
    """The reply under `number` if all of it has come. Raises _ChildLost for anything else."""
    if len(got) < 4:
        return None
    size, found = int.from_bytes(got[:4], "big"), bytes(got[4 : 4 + NUMBER_BYTES])
    if size <= _MAX_REPLY and len(got) < 4 + size and number.startswith(found):
        return None
    if len(got) != 4 + size or found != number:
        raise _ChildLost(
            "crash",
            "wrote into the pipe on which its process replies, so no reply of it is taken; leave "
            "descriptors alone that the function did not open",
        )
    return bytes(got[4 + NUMBER_BYTES :])


if __name__ == "__main__":
    main()
