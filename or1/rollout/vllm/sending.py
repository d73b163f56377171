"""Responses of one call of `generate` from one or several servers, each of which gets work as it has room."""

from __future__ import annotations

import math
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from or1.core.errors import EngineError, ServerLost
from or1.core.pulse import pulse
from or1.core.types import Response
from or1.rollout.dealing import Dealt, Window
from or1.rollout.engine import Finished, Job, Sampling, Slot, Supply, continued, decoded
from or1.rollout.vllm.process import MODEL_NAME
from or1.rollout.vllm.setup import VllmSetup
from or1.rollout.vllm.streams import Failed, Part, Streams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WATCH_S = 2.0
"""Seconds between checks of a silent server, so also the delay after which a dead server is noticed."""


class Server(Protocol):
    """What a call needs of a server; see `ServerClient`."""

    version: int
    setup: VllmSetup
    tokenizer: PreTrainedTokenizerBase

    @property
    def url(self) -> str:
        """Where the server listens."""
        ...

    @property
    def token(self) -> str:
        """The bearer token that the server checks."""
        ...

    def require_version(self) -> None:
        """Raise ServerLost if the server has weights of another version."""
        ...

    def require_life(self, heard: float) -> None:
        """Raise ServerLost if the server is dead, or has sent nothing since `heard` for too long."""
        ...

    def loss(self, cause: ServerLost, open_: int) -> ServerLost:
        """Return the error of a lost server, with the remedy."""
        ...


@dataclass
class Unfinished:
    """A job that a server works on, and the tokens received so far."""

    job: Job
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)

    def response(self, finish: str, version: int) -> Response:
        """Return the response of the job, without its text."""
        added = (np.array(self.tokens, np.int32), np.array(self.logp, np.float32))
        return continued(self.job, *added, finish, version)


class Line:
    """The requests of one call that one server works on."""

    def __init__(self, server: Server, sampling: Sampling, events: queue.SimpleQueue[tuple[Line, Part | Failed]]):
        server.require_version()
        self.server, self._sampling = server, sampling
        self.waiting: dict[Slot, Unfinished] = {}
        self.heard = time.monotonic()
        self._streams = Streams(server.url, server.token, lambda event: events.put((self, event)))

    def room(self, window: Window) -> int:
        """Return the number of responses that the server takes now."""
        return window.room(len(self.waiting), sum(not each.tokens for each in self.waiting.values()))

    def send(self, job: Job) -> None:
        """Send one job. A server finds the prompt of the group's other responses in its cache."""
        if not self.waiting:
            self.heard = time.monotonic()
        self.waiting[job.slot] = Unfinished(job)
        self._streams.send([job.slot], self._body(job))

    def _body(self, job: Job) -> dict[str, Any]:
        return self.server.setup.sampling_options(job, self._sampling) | {
            "model": MODEL_NAME,
            "prompt": job.context_ids.tolist(),
            "stream": True,
            "return_token_ids": True,
        }

    def finish(self, slot: Slot, reason: str) -> Finished:
        """Return a response, which the server no longer works on."""
        done = self.waiting.pop(slot)
        return decoded(done.job, done.response(reason, self.server.version), self.server.tokenizer)

    def note(self, part: Part) -> None:
        """Add new tokens to their response."""
        self.heard = time.monotonic()
        pulse()
        unfinished = self.waiting[part.slot]
        unfinished.tokens += part.token_ids
        unfinished.logp += part.logp

    def close(self) -> None:
        """Abort the open requests."""
        self._streams.close()


class Sending:
    """One call of `generate`.

    servers  hold the same weights; a job goes to the one with the most room, so it does not matter which
    room     most responses that this process has open at a server
    lost     called with a lost server, the cause, and the numbers of open responses and of servers left. It returns a
             server to use instead, or None. Raises ServerLost to end the call
    """

    def __init__(
        self,
        servers: Sequence[Server],
        supply: Supply,
        sampling: Sampling,
        room: int,
        lost: Callable[[Server, ServerLost, int, int], Server | None],
    ):
        self._supply, self._sampling, self._lost = supply, sampling, lost
        shared = len(servers) > 1 or isinstance(supply, Dealt)
        self._window = Window(room, shared=shared)
        self._one_by_one, self._more = len(servers) > 1, True
        self._events: queue.SimpleQueue[tuple[Line, Part | Failed]] = queue.SimpleQueue()
        self._again: deque[Job] = deque()
        self._lines: list[Line] = []
        self._checked = time.monotonic()
        self._deadline = math.inf if sampling.deadline_s is None else self._checked + sampling.deadline_s
        self._servers = list(servers)

    @property
    def open(self) -> int:
        """Number of responses that have been taken and are not finished."""
        return len(self._again) + sum(len(line.waiting) for line in self._lines)

    def run(self) -> Iterator[Finished]:
        """Yield responses as they finish."""
        try:
            self._again.extend(self._next(self._window.room(0, 0)))
            for server in list(self._servers):
                self._open(server)
            while self._fill():
                if (left := self._deadline - time.monotonic()) <= 0:
                    yield from self._late()
                    return
                try:
                    line, event = self._events.get(timeout=min(WATCH_S, left))
                except queue.Empty:
                    self._check()
                    continue
                if line in self._lines:
                    yield from self._handle(line, event)
                if time.monotonic() - self._checked > WATCH_S:
                    self._check()
        finally:
            for line in self._lines:
                line.close()

    def _open(self, server: Server) -> None:
        try:
            self._lines.append(Line(server, self._sampling, self._events))
        except ServerLost as cause:
            self._replace(server, cause)

    def _fill(self) -> bool:
        """Send jobs while a server has room; return False if none is open."""
        while self._lines and (self._again or self._more):
            line = max(self._lines, key=lambda line: line.room(self._window))
            if (room := line.room(self._window)) < 1:
                break
            for job in self._next(room):
                line.send(job)
        return self.open > 0

    def _next(self, room: int) -> list[Job]:
        # The responses of a lost server go first: the others have waited less long.
        if self._again:
            return [self._again.popleft() for _ in range(min(room, len(self._again)))]
        jobs = self._supply.take(1 if self._one_by_one else room)
        self._more = bool(jobs)
        return jobs

    def _handle(self, line: Line, event: Part | Failed) -> Iterator[Finished]:
        if isinstance(event, Part):
            line.note(event)
            if event.finish is not None:
                yield line.finish(event.slot, event.finish)
            return
        problem = f"vLLM at {line.server.url}: {event.cause}"
        if not event.lost:
            raise EngineError(problem)
        self._lose(line, ServerLost(problem))

    def _check(self) -> None:
        """Notice servers that are dead or hang."""
        self._checked = time.monotonic()
        for line in [line for line in self._lines if line.waiting]:
            try:
                line.server.require_life(line.heard)
            except ServerLost as cause:
                self._lose(line, cause)

    def _lose(self, line: Line, cause: ServerLost) -> None:
        """Give the jobs of a lost server to the others. Their tokens are lost, and come again from the same seeds."""
        self._lines.remove(line)
        self._again.extend(each.job for each in line.waiting.values())
        line.close()
        self._replace(line.server, cause)

    def _replace(self, server: Server, cause: ServerLost) -> None:
        self._servers.remove(server)
        if (instead := self._lost(server, cause, self.open, len(self._servers))) is not None:
            self._servers.append(instead)
            self._open(instead)

    def _late(self) -> Iterator[Finished]:
        """Yield what is open at the deadline, and what nobody has taken."""
        for line in self._lines:
            for slot in list(line.waiting):
                yield line.finish(slot, "deadline")
        server = self._lines[0].server
        while late := [*self._again, *self._supply.take(self.open + 256)]:
            self._again.clear()
            for job in late:
                yield decoded(job, Unfinished(job).response("deadline", server.version), server.tokenizer)
