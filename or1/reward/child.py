"""The child process that `or1.reward.worker` forks: it prepares once, then grades one job after another."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from or1.core.errors import Or1Error
from or1.core.processes import die_with
from or1.core.types import Score

NUMBER_BYTES = 16
"""Length of a job's random number, which precedes every message about the job."""
MAX_CAUSE = 1000
"""Characters kept of an exception's text."""
ON, OVER = b"+", b"-"
"""First byte of a child's reply. ON: the child waits for the next job. OVER: the child ends after this reply."""

_OWN = (os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep, "<frozen ")
_LIBRARIES = (sys.prefix + os.sep, sys.base_prefix + os.sep)

Job = dict[str, Any]


class Work(NamedTuple):
    """The work of one child: `prepare` once, whose reply carries `number`, then `grader` for each job."""

    grader: Callable[[Job], Score | bool]
    prepare: Callable[[], Any]
    number: bytes


def parsed(message: bytes) -> tuple[bytes, float, bytes]:
    """Return the number, the time limit in seconds, and the JSON of a job."""
    limit_s, _, job = message[NUMBER_BYTES:].partition(b" ")
    return message[:NUMBER_BYTES], float(limit_s), job


def framed(message: bytes) -> bytes:
    """Return a message with its length as a prefix of 4 bytes."""
    return len(message).to_bytes(4, "big") + message


def live(pipe: socket.socket, worker: int, output: int | None, work: Work) -> NoReturn:
    """Run as a child of the process `worker`. End when the pipe closes or the worker dies; never return.

    output  descriptor for stdout and stderr; None: keep them
    """
    own, code = os.getpid(), 1
    try:
        die_with(worker)
        _print_to(output)
        with contextlib.suppress(EOFError, OSError):
            _grade_jobs(pipe, own, work)
        code = 0
    finally:
        if code and os.getpid() == own:
            traceback.print_exc()
        os._exit(code)


def _grade_jobs(pipe: socket.socket, own: int, work: Work) -> None:
    number = work.number
    last, reply = _prepared(work.prepare)
    while True:
        # A forked copy of this process, in which the function returned, must not reply.
        if os.getpid() != own:
            os._exit(0)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the function may have put anything there
                stream.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.sendall(framed(number + (OVER if last else ON) + reply))
        if last:
            return
        number, limit_s, job = parsed(_received(pipe))
        # A kernel timer also ends code that holds the GIL.
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        last, reply = _reply(work.grader, json.loads(job))


def _received(pipe: socket.socket) -> bytes:
    """Return the next message. Raises EOFError."""
    size, parts = int.from_bytes(pipe.recv(4, socket.MSG_WAITALL), "big"), []
    while size:
        if not (data := pipe.recv(min(size, 1 << 20))):
            break
        parts.append(data)
        size -= len(data)
    if size or not parts:
        raise EOFError
    return b"".join(parts)


def _print_to(output: int | None) -> None:
    """Redirect stdout and stderr to the log, line-buffered, with any character that UTF-8 lacks as an escape."""
    if output is not None:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
    # New streams, since a stream that was opened on a file fails on the pipe that replaces its descriptor.
    sys.stdout, sys.stderr = (
        open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        for descriptor in (1, 2)
    )


def _prepared(prepare: Callable[[], Any]) -> tuple[bool, bytes]:
    """Return (failed, reply): the error text if `prepare` failed, else its result as JSON."""
    try:
        return False, json.dumps(prepare()).encode()
    except BaseException as error:  # noqa: BLE001  the process boundary; a module may well call sys.exit
        return True, cause_of(error).encode("utf-8", "backslashreplace")


def _reply(grader: Callable[[Job], Score | bool], job: Job) -> tuple[bool, bytes]:
    """Return (last, reply): the reply to a job, and whether this child must end after it."""
    try:
        verdict = grader(job)
    except BaseException as error:  # noqa: BLE001  the process boundary: whatever a grader raises is a counted status
        # After a MemoryError the process keeps its memory, so the next job needs a new process.
        return _is_memory(error), encoded("crash", None, cause_of(error))
    if isinstance(verdict, Score):
        # JSON has no NaN; None is a response without a reward.
        reward = verdict.reward if math.isfinite(verdict.reward) else None
        return False, encoded(verdict.status.value, reward, verdict.cause)
    return False, encoded("ok", 1.0, "") if verdict else encoded("wrong", 0.0, "")


def encoded(status: str, reward: float | None, cause: str) -> bytes:
    """Return a reply as JSON."""
    return json.dumps([status, reward, cause]).encode()


def cause_of(error: BaseException) -> str:
    """Return the text of an error with its last position in the user's code, or in a library if there is none.

    Errors of or1 are returned without a position.
    """
    full = _is_memory(error)
    if full:
        # The frames of the error keep the objects that filled the memory.
        traceback.clear_frames(error.__traceback__)
    message = _text_of(error)
    if len(message) > MAX_CAUSE:
        message = f"{message[:MAX_CAUSE]} ... (of {len(message):,} characters)"
    if isinstance(error, Or1Error):
        return message
    name = type(error).__name__
    text = f"{name}: {message}" if message else name
    found = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    others = [(code, line) for code, line in found if not code.co_filename.startswith(_OWN)]
    places = [(code, line) for code, line in others if not code.co_filename.startswith(_LIBRARIES)] or others
    if places:
        code, line = places[-1]
        text += f" ({code.co_filename}:{line}, in {code.co_name})"
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if full and limit != resource.RLIM_INFINITY:
        text += f"; reward.memory_mib = {limit >> 20} is the limit of one process: raise it, or set 0 for none"
    return text


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # noqa: BLE001  __str__ may be the user's code
        return "(its message cannot be read)"


def _is_memory(error: BaseException) -> bool:
    """Return True if memory ran out, in Python or in a library. torch raises a RuntimeError for this."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    message = _text_of(error)[-2000:] if isinstance(error, RuntimeError) else ""
    return "allocate memory" in message or "bad_alloc" in message
