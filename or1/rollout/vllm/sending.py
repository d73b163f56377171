"""Responses of one call of `generate` from one or several servers, each of which gets work as it has room.

A push of weights may come in the middle of a call. The server's client then interrupts every line to the server. Each
line keeps the tokens so far with their version, and sends the rest of its responses again once the push is complete.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from or1.core.errors import EngineError, ServerLost
from or1.core.pulse import pulse
from or1.core.seeds import seed_of
from or1.core.types import Response
from or1.rollout.dealing import Dealt, Window
from or1.rollout.engine import INTERRUPTED, Finished, Job, Sampling, Slot, Supply, continued, decoded
from or1.rollout.vllm.process import MODEL_NAME
from or1.rollout.vllm.setup import VllmSetup
from or1.rollout.vllm.streams import Event, Failed, Part, Streams, Switch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WATCH_S = 2.0
"""Seconds between checks of a silent server, so also the delay after which a dead server is noticed."""


class Server(Protocol):
    """What a call needs of a server; see `ServerClient`.

    gate    held while requests are sent, and from the start of a push until its end
    starts  restarts of the server so far
    heard   time of the last event of any call, by time.monotonic
    lines   of all calls, which a push interrupts
    """

    version: int
    setup: VllmSetup
    tokenizer: PreTrainedTokenizerBase
    gate: threading.RLock
    starts: int
    heard: float
    lines: list[Line]

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

    def require_life(self) -> None:
        """Raise ServerLost if the server is dead, or has sent nothing for too long."""
        ...

    def loss(self, cause: ServerLost, open_: int) -> ServerLost:
        """Return the error of a lost server, with the remedy."""
        ...


@dataclass(eq=False)
class Unfinished:
    """A job that a server works on, and the tokens received since its last push."""

    job: Job
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)

    def response(self, finish: str, version: int) -> Response:
        """Return the response of the job, without its text."""
        added = (np.array(self.tokens, np.int32), np.array(self.logp, np.float32))
        return continued(self.job, *added, finish, version)

    def freeze(self, version: int) -> None:
        """Move the tokens into the job, to continue under other weights. version: of the weights so far."""
        if self.tokens:
            self.job = self.job._replace(
                unfinished=self.response("length", version),
                max_new=self.job.max_new - len(self.tokens),
                # Not the old seed, whose random numbers the tokens so far have used.
                seed=seed_of(self.job.seed, len(self.tokens)),
            )
            self.forget()

    def forget(self) -> None:
        """Drop the tokens, which a lost server sampled; they come again from the same seed."""
        self.tokens, self.logp = [], []


class Line:
    """The requests of one call that one server works on.

    version  of the weights that sample the tokens
    starts   restarts of the server when the requests were sent
    """

    def __init__(self, server: Server, sampling: Sampling, events: queue.SimpleQueue[tuple[Line, Event]]):
        self.server, self._sampling, self._events = server, sampling, events
        self.waiting: dict[Slot, Unfinished] = {}
        with server.gate:
            self._connect()
            server.lines.append(self)

    def _connect(self) -> None:
        """Open streams to the server. Hold the gate. Raises ServerLost, EngineError."""
        self.server.require_version()
        self.version, self.starts, self._interrupted = self.server.version, self.server.starts, False
        self.server.heard = time.monotonic()
        self._streams = Streams(self.server.url, self.server.token, lambda event: self._events.put((self, event)))

    def room(self, window: Window) -> int:
        """Return the number of responses that the server takes now."""
        return window.room(len(self.waiting), sum(not each.tokens for each in self.waiting.values()))

    def send(self, each: Unfinished) -> None:
        """Send one job. A server finds the prompt of the group's other responses in its cache."""
        with self.server.gate:
            if not self.waiting:
                self.server.heard = time.monotonic()
            self.waiting[each.job.slot] = each
            if not self._interrupted:
                self._post(each)

    def _post(self, each: Unfinished) -> None:
        body = self.server.setup.sampling_options(each.job, self._sampling) | {
            "model": MODEL_NAME,
            "prompt": each.job.context_ids.tolist(),
            "stream": True,
            "return_token_ids": True,
        }
        self._streams.send([each.job.slot], body)

    def interrupt(self, limit_s: float) -> None:
        """End the requests of the paused server with a `Switch`, as `Streams.interrupt`. Hold the gate."""
        if not self._interrupted:
            self._interrupted = True
            self._streams.interrupt(limit_s)

    def resume(self) -> None:
        """After a `Switch`: wait for the end of the push, and continue every response. Raises ServerLost."""
        for each in self.waiting.values():
            each.freeze(self.version)
        with self.server.gate:
            self._connect()
            for each in self.waiting.values():
                self._post(each)

    def note(self, part: Part) -> None:
        """Add new tokens to their response."""
        pulse()
        unfinished = self.waiting[part.slot]
        unfinished.tokens += part.token_ids
        unfinished.logp += part.logp

    def close(self) -> None:
        """Abort the open requests."""
        with contextlib.suppress(ValueError):
            self.server.lines.remove(self)
        self._streams.close()


class Lost(Protocol):
    """What to do about a lost server."""

    def __call__(self, server: Server, cause: ServerLost, starts: int, open_: int, left: int) -> Server | None:
        """Return a server to use instead, or None. Raises ServerLost to end the call.

        starts  restarts of the server when the lost requests were sent
        open_   number of open responses
        left    number of servers left
        """
        ...


class Sending:
    """One call of `generate`.

    servers  hold the same weights; a job goes to the one with the most room, so it does not matter which
    room     most responses that this process has open at a server
    lost     called with every lost server
    waiting  the jobs that are taken and not finished
    """

    def __init__(self, servers: Sequence[Server], supply: Supply, sampling: Sampling, room: int, lost: Lost):
        self.waiting: dict[Slot, Unfinished] = {}
        self._supply, self._sampling, self._lost = supply, sampling, lost
        shared = len(servers) > 1 or isinstance(supply, Dealt)
        self._window = Window(room, shared=shared)
        self._one_by_one, self._more = len(servers) > 1, True
        self._events: queue.SimpleQueue[tuple[Line, Event]] = queue.SimpleQueue()
        self._again: deque[Unfinished] = deque()
        self._lines: list[Line] = []
        self._servers = list(servers)

    def run(self) -> Generator[Finished, None, None]:
        """Yield responses as they finish."""
        began = self._checked = time.monotonic()
        deadline = math.inf if self._sampling.deadline_s is None else began + self._sampling.deadline_s
        try:
            self._again.extend(self._next(self._window.room(0, 0)))
            for server in list(self._servers):
                self._open(server)
            while self._fill():
                if (left := deadline - time.monotonic()) <= 0:
                    yield from self._late()
                    return
                if self._sampling.stop():
                    yield from self._end(INTERRUPTED)
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
        with server.gate:
            starts = server.starts
            try:
                self._lines.append(Line(server, self._sampling, self._events))
            except ServerLost as cause:
                self._replace(server, cause, starts)

    def _fill(self) -> bool:
        """Send jobs while a server has room; return False if none is open."""
        while self._lines and (self._again or self._more):
            line = max(self._lines, key=lambda line: line.room(self._window))
            if (room := line.room(self._window)) < 1:
                break
            for each in self._next(room):
                line.send(each)
        return bool(self.waiting)

    def _next(self, room: int) -> list[Unfinished]:
        # The responses of a lost server go first: the others have waited less long.
        if self._again:
            return [self._again.popleft() for _ in range(min(room, len(self._again)))]
        jobs = [Unfinished(job) for job in self._supply.take(1 if self._one_by_one else room)]
        self.waiting |= {each.job.slot: each for each in jobs}
        self._more = bool(jobs)
        return jobs

    def _handle(self, line: Line, event: Event) -> Iterator[Finished]:
        if isinstance(event, Part):
            # Of any call: the requests of a late call may wait in the server for those of an earlier one.
            line.server.heard = time.monotonic()
            line.note(event)
            if event.finish is not None:
                done = line.waiting.pop(event.slot)
                yield self._finished(done, event.finish, line.version)
            return
        if isinstance(event, Switch):
            try:
                line.resume()
            except ServerLost as cause:
                self._lose(line, cause)
            return
        self._fail(line, event)

    def _fail(self, line: Line, event: Failed) -> None:
        problem = f"vLLM at {line.server.url}: {event.cause}"
        if not event.lost:
            raise EngineError(problem)
        self._lose(line, ServerLost(problem))

    def _finished(self, done: Unfinished, finish: str, version: int) -> Finished:
        del self.waiting[done.job.slot]
        return decoded(done.job, done.response(finish, version), self._tokenizer)

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self._servers[0].tokenizer

    def _check(self) -> None:
        """Notice servers that are dead or hang."""
        self._checked = time.monotonic()
        for line in [line for line in self._lines if line.waiting]:
            try:
                line.server.require_life()
            except ServerLost as cause:
                self._lose(line, cause)

    def _lose(self, line: Line, cause: ServerLost) -> None:
        """Give the jobs of a lost server to the others, which sample the tokens of the present weights again."""
        self._lines.remove(line)
        for each in line.waiting.values():
            each.forget()
        self._again.extend(line.waiting.values())
        line.close()
        self._replace(line.server, cause, line.starts)

    def _replace(self, server: Server, cause: ServerLost, starts: int) -> None:
        self._servers.remove(server)
        instead = self._lost(server, cause, starts, len(self.waiting), len(self._servers))
        if instead is not None:
            self._servers.append(instead)
            self._open(instead)

    def _end(self, finish: str) -> Iterator[Finished]:
        """Yield what is open, with the tokens so far."""
        version = self._lines[0].version
        for line in self._lines:
            for each in line.waiting.values():
                yield self._finished(each, finish, line.version)
        for each in self._again:
            yield self._finished(each, finish, version)

    def _late(self) -> Iterator[Finished]:
        """Yield what is open at the deadline, and what nobody has taken."""
        version = self._lines[0].version
        yield from self._end("deadline")
        while late := self._supply.take(256):
            for job in late:
                yield decoded(job, Unfinished(job).response("deadline", version), self._tokenizer)


class Call(Iterator[Finished]):
    """The responses of one call of `generate`, as an iterator."""

    def __init__(self, sending: Sending) -> None:
        self._responses, self._waiting = sending.run(), sending.waiting

    def __next__(self) -> Finished:
        return next(self._responses)

    def close(self) -> None:
        """Abort the pending responses."""
        self._responses.close()

    def unfinished(self) -> dict[Slot, Response]:
        """Return the pending responses that have tokens, as they were at the last push. Callable from any thread."""
        jobs = [each.job for each in dict(self._waiting).values()]
        return {job.slot: job.unfinished for job in jobs if job.unfinished is not None}
