"""The child that runs candidates. It has its own GPU context, so that a candidate can hang or crash without harm."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any, Self

from or1.tune.search import FIRST_LIMIT_S, Budget, CandidateError, Values

BENCHES = "or1.tune.benches:benches"
"""The function that makes the benches in the child, as module:function."""
# Seconds between two reports to the display while a candidate runs.
_TICK_S = 0.5
# torch and a GPU's context take this long to load on a slow disk.
_START_S = 45.0
_MOST_TEXT = 300
# A child has the ranks of none of its parent's groups, and compiles with as few threads as a rank.
_NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OR1_FAULT")


class Child:
    """A runner (see `or1.tune.search.Runner`) in a process of its own. Use as a context manager.

    case     given to the function that makes the benches
    budget   bounds the start of the process; its display lives while a candidate runs
    benches  that function, as module:function
    """

    def __init__(self, case: dict[str, Any], budget: Budget, benches: str = BENCHES):
        self._case, self._budget, self._benches = case, budget, benches
        self._prepared: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._wire: Connection | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._output.close()

    def prepare(self, group: str, limit_s: float) -> None:
        """Make the inputs and exact results of a group. Raises CandidateError."""
        self._ask({"do": "prepare", "group": group}, limit_s)
        self._prepared.add(group)

    def check(self, group: str, options: Values, limit_s: float) -> float:
        """Run a candidate once and return its error. Raises CandidateError."""
        if group not in self._prepared:
            # In a process that replaces an ended one; this is not the candidate's time.
            self.prepare(group, self._budget.left)
        return float(self._ask({"do": "check", "group": group, "options": options}, limit_s)["error"])

    def seconds(self, group: str, options: Values, limit_s: float) -> float:
        """Return the seconds of one run. Raises CandidateError."""
        if group not in self._prepared:
            # The new process must compile the candidate again.
            self.check(group, options, min(FIRST_LIMIT_S, self._budget.left))
        return float(self._ask({"do": "seconds", "group": group, "options": options}, limit_s)["seconds"])

    def _ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        wire = self._wire or self._start(min(_START_S, self._budget.left))
        answer: dict[str, Any] = {}
        try:
            wire.send_bytes(json.dumps(request).encode())
            answer = self._receive(wire, limit_s)
        except (OSError, EOFError):
            raise CandidateError(self._why_ended()) from None
        if "why" in answer:
            if answer.get("broken"):
                # After an error of the device every later call in the same process fails too.
                self._end()
            raise CandidateError(answer["why"])
        return answer

    def _receive(self, wire: Connection, limit_s: float) -> dict[str, Any]:
        end = time.monotonic() + limit_s
        while not wire.poll(max(0.0, min(_TICK_S, end - time.monotonic()))):
            self._budget.tick()
            if time.monotonic() >= end:
                self._end()
                raise CandidateError(f"no answer within {limit_s:.3g} s; it was ended")
        answer = json.loads(wire.recv_bytes())
        return dict(answer)

    def _start(self, limit_s: float) -> Connection:
        """Start the child, and wait until it has loaded what it needs."""
        ours, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        arguments = [str(theirs.fileno()), str(os.getpid()), self._benches, json.dumps(self._case)]
        self._output.seek(0)
        self._output.truncate()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "or1.tune.child", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                env=environment,
                start_new_session=True,
            )
        self._wire = wire = Connection(ours.detach())
        try:
            answer = self._receive(wire, limit_s)
        except (OSError, EOFError):
            raise CandidateError(self._why_ended()) from None
        if "why" in answer:
            self._end()
            raise CandidateError(answer["why"])
        return wire

    def _why_ended(self) -> str:
        """End the child, which has closed its connection, and return the reason as far as it is known."""
        process = self._process
        code: int | None = None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(5.0)
        self._end()
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return f"its process ended ({how})" + (f": {lines[-1][:_MOST_TEXT]}" if lines else "")

    def _end(self) -> None:
        if self._wire is not None:
            self._wire.close()
        if self._process is not None:
            # The session of the child, with the compilers that it may have started.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
        self._wire = self._process = None
        self._prepared.clear()
