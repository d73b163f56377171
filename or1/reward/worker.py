"""The process at the other end of `or1.reward.pool`'s socket.

    python -m or1.reward.worker FD MODULE:FUNCTION OPTIONS "BYTES AS|DATA" LOG

The worker loads FUNCTION(job) once, then forks a child that calls FUNCTION for one job after another. A child that
hangs is killed. The next child takes milliseconds to fork from this warm process, which may fork because it has one
thread. A child cannot reach the trainer's socket: this process sends exactly one reply to every job.

Every job and every reply carry a random number drawn for the job. Bytes that the function or a forked copy of it
writes into the pipe lack this number. They end the child and count as a crash, and never become the reward of a job.
This protects against mistakes only: a function that searches its own memory can find the number.
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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from or1.core.processes import adopt_orphans, has_children, kill_descendants, reap_orphans
from or1.reward.child import NUMBER_BYTES, OVER, Work, encoded, framed, live, parsed
from or1.reward.output import OutputLog

JOBS_PER_CHILD = 5000
"""Jobs after which a new child is forked, to bound the memory that sympy leaks."""
READY, WAIT = b"ready ", b"wait"
"""READY and the result of `begin` as JSON are the first message of a worker. Any other first message is an error text,
and the last message. WAIT means that a new child is being prepared for a job, which may take as long as the first."""

# The child's own timer ends a job first. A busy machine needs some seconds to deliver its signal.
_GRACE_S = 4.0
_MAX_REPLY = 1 << 16
_LIMITS = {"AS": resource.RLIMIT_AS, "DATA": resource.RLIMIT_DATA}


class _TrainerGone(Exception):
    """The other side of the socket ended or closed it."""


class _ChildLost(Exception):
    """The child sent no valid reply. Arguments: status and cause of its job."""


class _StartFailed(Exception):
    """A new child could not prepare. Argument: the cause."""


def main() -> None:
    """Report readiness, then answer jobs until the other side closes the socket or dies."""
    descriptor, path, options, memory, log = sys.argv[1:]
    # The trainer handles Ctrl-C. SIGALRM must kill, even if the trainer was started with the signal ignored or blocked.
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
            # With the limit, 10^{10^{10}} raises MemoryError instead of triggering the machine's out-of-memory killer.
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(_LIMITS[kind], (int(limit), int(limit)))
        return begin(json.loads(options))

    name = json.loads(options).get("path", path)
    children = _Children(
        grader=getattr(module, function_name),
        prepare=prepare,
        jobs=jobs,
        log=OutputLog(log) if log else None,
        name=name,
    )
    try:
        with contextlib.suppress(EOFError, OSError, _TrainerGone):
            children.serve()
    finally:
        children.end()
    # Without /proc there is no list of descendants; kill the process group at least.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


@dataclass
class _Child:
    """One forked grading process.

    pidfd  readable when the process ends; None before Linux 5.3 and on other systems
    pipe   non-blocking
    jobs   number of jobs sent so far
    """

    pid: int
    pidfd: int | None
    pipe: socket.socket
    jobs: int = 0

    def has_ended(self) -> bool:
        """Return True if the process is dead, without reaping it."""
        if not hasattr(os, "waitid"):
            return os.waitpid(self.pid, os.WNOHANG)[0] != 0
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def receive(self, received: bytearray) -> bool:
        """Append all bytes in the pipe to `received`. Return True while the pipe is open."""
        try:
            while len(received) <= _MAX_REPLY:
                if not (data := self.pipe.recv(1 << 16)):
                    return False
                received += data
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def kill(self) -> int:
        """Kill and reap the process. Return its exit code, -N for signal N, or 0 if it was reaped before."""
        code = 0
        with contextlib.suppress(ProcessLookupError):  # a dead process keeps its exit code
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pipe.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
        return code


class _Children:
    """At most one live child, forked when needed.

    name  name of the grader in errors about loading it
    """

    def __init__(
        self,
        *,
        grader: Callable[[dict[str, Any]], Any],
        prepare: Callable[[], Any],
        jobs: Connection,
        log: OutputLog | None,
        name: str,
    ):
        self._grader, self._prepare, self._name = grader, prepare, name
        self._jobs, self._log = jobs, log
        self._child: _Child | None = None

    def serve(self) -> None:
        """Answer jobs. Raise EOFError, OSError or _TrainerGone when the other side has ended."""
        # The first child shows whether `begin` works at all.
        try:
            _, about = self._fork()
        except _StartFailed as failure:
            self._jobs.send_bytes(str(failure).encode("utf-8", "replace"))
            return
        self._jobs.send_bytes(READY + about)
        while True:
            while self._jobs.fileno() not in self._wait({self._jobs.fileno(): select.POLLIN}, math.inf):
                pass
            number, limit_s, job = parsed(self._jobs.recv_bytes())
            self._jobs.send_bytes(number + self._ask(number, limit_s, job))

    def end(self) -> int:
        """Kill the child and all its descendants, and reap them. Return the child's exit code, -N for signal N."""
        code = 0
        if self._child is not None:
            code = self._child.kill()
            self._child = None
        if has_children():
            kill_descendants(os.getpid())
            reap_orphans()
        if self._log is not None:
            self._log.close()
        return code

    def _ask(self, number: bytes, limit_s: float, job: bytes) -> bytes:
        """Return the reply to one job: the child's reply, or the status of a child that timed out or died."""
        child = self._child
        reap_orphans(but=None if child is None else child.pid)
        if child is not None and (child.jobs == JOBS_PER_CHILD or child.has_ended()):
            self.end()
            child = None
        if child is None:
            self._jobs.send_bytes(number + WAIT)
            try:
                child, _ = self._fork()
            except _StartFailed as failure:
                return encoded("crash", None, str(failure))
        child.jobs += 1
        # A second number, so that the trainer's number is never in the child's memory.
        own = secrets.token_bytes(NUMBER_BYTES)
        try:
            reply = self._exchange(child, own, own + str(limit_s).encode() + b" " + job, limit_s + _GRACE_S)
        except _ChildLost as lost:
            return encoded(*self._end_of(lost))
        if reply[:1] == OVER:
            self.end()
        elif self._log is not None:
            self._log.end_line()
        return reply[1:]

    def _fork(self) -> tuple[_Child, bytes]:
        """Fork a child and wait until it is prepared. Return the child and the result of `begin` as JSON.

        Raises _StartFailed.
        """
        pipe, theirs = socket.socketpair()
        output = self._log.open() if self._log is not None else None
        number, worker = secrets.token_bytes(NUMBER_BYTES), os.getpid()
        pid = os.fork()
        if pid == 0:
            pipe.close()
            self._jobs.close()
            live(theirs, worker, output, Work(self._grader, self._prepare, number))
        theirs.close()
        if output is not None:
            os.close(output)
        pidfd = None
        with contextlib.suppress(AttributeError, OSError):  # Linux before 5.3, or another system
            pidfd = os.pidfd_open(pid)
        pipe.setblocking(False)
        child = self._child = _Child(pid, pidfd, pipe)
        try:
            reply = self._exchange(child, number, b"", math.inf)
        except _ChildLost as lost:
            fate = f"its process ended early ({self._end_of(lost)[2]})"
            raise _StartFailed(f"{self._name} cannot be loaded: {fate}") from lost
        if reply[:1] == OVER:
            self.end()
            raise _StartFailed(reply[1:].decode("utf-8", "replace"))
        return child, reply[1:]

    def _exchange(self, child: _Child, number: bytes, message: bytes, limit_s: float) -> bytes:
        """Send a message to the child, unless empty, and return its reply under this number.

        Raises _ChildLost, and _TrainerGone as soon as the trainer has ended, whatever the child is doing.
        """
        deadline = time.monotonic() + limit_s
        unsent, received, is_open = memoryview(framed(message) if message else b""), bytearray(), True
        jobs, pipe = self._jobs.fileno(), child.pipe.fileno()
        while True:
            wanted = {jobs: select.POLLIN}
            if is_open:
                wanted[pipe] = select.POLLIN | (select.POLLOUT if unsent else 0)
            if child.pidfd is not None:
                wanted[child.pidfd] = select.POLLIN
            ready = self._wait(wanted, deadline)
            if jobs in ready:  # the trainer sends no job before this one is answered, so the socket is closed
                raise _TrainerGone
            if pipe in ready:
                with contextlib.suppress(OSError):
                    unsent = unsent[child.pipe.send(unsent) :] if unsent else unsent
                is_open = child.receive(received)
            if (reply := _reply_in(received, number)) is not None:
                return reply
            if child.has_ended() if child.pidfd is not None else not is_open:
                if child.receive(received) and (reply := _reply_in(received, number)) is not None:
                    return reply
                raise _ChildLost("", "")
            if time.monotonic() > deadline:
                raise _ChildLost("timeout", "")

    def _wait(self, wanted: dict[int, int], deadline: float) -> set[int]:
        """Return the descriptors that are ready; none near the deadline. Drain the child's output meanwhile."""
        poll = select.poll()
        for descriptor, events in wanted.items():
            poll.register(descriptor, events)
        log = self._log
        output = None if log is None else log.fileno()
        if output is not None:
            poll.register(output, select.POLLIN)
        left_s = min(deadline - time.monotonic(), 3600.0)
        ready = {descriptor for descriptor, _ in poll.poll(max(left_s, 0.0) * 1000 + 1)}
        if log is not None and output in ready:
            log.drain()
        return ready - {output}

    def _end_of(self, lost: _ChildLost) -> tuple[str, float | None, str]:
        """End a lost child. Return status, reward and cause of its job."""
        (status, cause), code = lost.args, self.end()
        if status:
            return status, None, cause
        if code == -signal.SIGALRM:
            return "timeout", None, ""
        return "crash", None, f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _reply_in(received: bytearray, number: bytes) -> bytes | None:
    """Return the reply under `number`, or None while it is incomplete. Raise _ChildLost for any other bytes."""
    if len(received) < 4:
        return None
    size, found = int.from_bytes(received[:4], "big"), bytes(received[4 : 4 + NUMBER_BYTES])
    if size <= _MAX_REPLY and len(received) < 4 + size and number.startswith(found):
        return None
    if len(received) != 4 + size or found != number:
        raise _ChildLost(
            "crash",
            "wrote into the pipe that carries the replies of its process, so its reply was discarded; the function "
            "must not write to descriptors that it did not open",
        )
    return bytes(received[4 + NUMBER_BYTES :])


if __name__ == "__main__":
    main()
