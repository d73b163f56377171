"""The life of a process that `or1.reward.worker` forks: prepare, then grade one job after another."""

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
"""Of a job, in front of everything that is said about it."""
MAX_CAUSE = 1000
"""Characters that are kept of the text of an exception."""
ON, OVER = b"+", b"-"
"""In front of what a child says: whether it waits for a job, or ends with this."""

_OWN = (os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep, "<frozen ")
_LIBRARIES = (sys.prefix + os.sep, sys.base_prefix + os.sep)

Job = dict[str, Any]


class Work(NamedTuple):
    """What a child does: `prepare` once, under the number that the worker drew for it, then `grader` for each job."""

    grader: Callable[[Job], Score | bool]
    prepare: Callable[[], Any]
    number: bytes


def parsed(message: bytes) -> tuple[bytes, float, bytes]:
    """Return number, seconds and JSON of a job."""
    limit_s, _, job = message[NUMBER_BYTES:].partition(b" ")
    return message[:NUMBER_BYTES], float(limit_s), job


def framed(message: bytes) -> bytes:
    """Return a message with its length in front."""
    return len(message).to_bytes(4, "big") + message


def live(pipe: socket.socket, worker: int, output: int | None, work: Work) -> NoReturn:
    """Be a child of the process `worker`. Ends at a closed pipe or with its worker, never returns.

    output  descriptor for what is printed, None to leave it as it is
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
    last, said = _prepared(work.prepare)
    while True:
        # A copy of this process, which the function forked and returned from, says nothing.
        if os.getpid() != own:
            os._exit(0)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the function may have put anything there
                stream.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.sendall(framed(number + (OVER if last else ON) + said))
        if last:
            return
        number, limit_s, job = parsed(_received(pipe))
        # The kernel's timer also ends code that holds the GIL.
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        last, said = _reply(work.grader, json.loads(job))


def _received(pipe: socket.socket) -> bytes:
    """The next message. Raises EOFError."""
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
    """Send what is printed to the log; line by line, and whatever characters there are."""
    if output is not None:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
    # New ones: a stream that was opened on a file does not get along with the pipe that takes its descriptor.
    sys.stdout, sys.stderr = (
        open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        for descriptor in (1, 2)
    )


def _prepared(prepare: Callable[[], Any]) -> tuple[bool, bytes]:
    """Whether it failed, and why, or what `begin` told."""
    try:
        return False, json.dumps(prepare()).encode()
    except BaseException as error:  # noqa: BLE001  the process boundary; a module may well call sys.exit
        return True, cause_of(error).encode("utf-8", "backslashreplace")


def _reply(grader: Callable[[Job], Score | bool], job: Job) -> tuple[bool, bytes]:
    """Whether this child should end, and the reply."""
    try:
        verdict = grader(job)
    except BaseException as error:  # noqa: BLE001  the process boundary: whatever a grader raises is a counted status
        # The memory of a process that has run out of it stays full.
        return _is_memory(error), encoded("crash", None, cause_of(error))
    if isinstance(verdict, Score):
        # JSON has no NaN; None is a response without a reward.
        return False, encoded(verdict.status.value, verdict.reward if math.isfinite(verdict.reward) else None, "")
    return False, encoded("ok", 1.0, "") if verdict else encoded("wrong", 0.0, "")


def encoded(status: str, reward: float | None, cause: str) -> bytes:
    """Return a reply as JSON."""
    return json.dumps([status, reward, cause]).encode()


def cause_of(error: BaseException) -> str:
    """Return an error with the last place in the user's own code, else in a library.

    Errors of or1 say enough themselves.
    """
    full = _is_memory(error)
    if full:
        # What filled the memory hangs on the frames of the error.
        traceback.clear_frames(error.__traceback__)
    said = _text_of(error)
    if len(said) > MAX_CAUSE:
        said = f"{said[:MAX_CAUSE]} ... (of {len(said):,} characters)"
    if isinstance(error, Or1Error):
        return said
    name = type(error).__name__
    text = f"{name}: {said}" if said else name
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
    except BaseException:  # noqa: BLE001  its __str__ is the user's too
        return "(its message cannot be read)"


def _is_memory(error: BaseException) -> bool:
    """Whether memory ran out, in Python or in a library: torch says it in a RuntimeError."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    said = _text_of(error)[-2000:] if isinstance(error, RuntimeError) else ""
    return "allocate memory" in said or "bad_alloc" in said
