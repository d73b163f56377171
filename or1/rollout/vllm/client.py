"""Generation with a running vLLM server, over HTTP."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import numpy as np

from or1.core.errors import EngineError, ServerLost
from or1.core.seeds import seed_of
from or1.core.types import Prompt, Response
from or1.rollout.engine import INTERRUPTED, Finished, Job, Sampling, Slot, continued, decoded, jobs_of
from or1.rollout.vllm.drafts import DraftCounts, counts_on
from or1.rollout.vllm.process import MODEL_NAME, bearer, may_take_proxy
from or1.rollout.vllm.setup import VllmSetup
from or1.rollout.vllm.streams import Failed, Part, Streams, Switch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WATCH_S = 2.0
"""Seconds between checks of a silent server, so also the delay after which a dead server is noticed."""
STALL_S = 300.0
"""A live server that sends nothing for this long hangs. Prefilling the longest prompts takes seconds."""
RPC_LIMIT_S = 600.0
FLUSH_S = 5.0
"""Longest time that a paused server may need to report the tokens which it has sampled."""


class Address(NamedTuple):
    """Where a server listens.

    url    http://host:port
    token  the bearer token that `RequireToken` checks
    own    True if or1 started the server
    """

    url: str
    token: str
    own: bool


@dataclass
class _Unfinished:
    """A job that the server works on, and the tokens received so far."""

    job: Job
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)

    def response(self, finish: str, version: int) -> Response:
        added = (np.array(self.tokens, np.int32), np.array(self.logp, np.float32))
        return continued(self.job, *added, finish, version)

    def frozen(self, version: int) -> _Unfinished:
        """Return the rest of the job, to continue under other weights. version: of the weights so far."""
        if not self.tokens:
            return _Unfinished(self.job)
        rest = self.job._replace(
            unfinished=self.response("length", version),
            max_new=self.job.max_new - len(self.tokens),
            # Not the old seed, whose random numbers the tokens so far have used.
            seed=seed_of(self.job.seed, len(self.tokens)),
        )
        return _Unfinished(rest)


class Call(Iterator[Finished]):
    """The responses of one call of `generate`, as an iterator."""

    def __init__(self, responses: Generator[Finished, None, None], waiting: Mapping[Slot, _Unfinished]) -> None:
        self._responses, self._waiting = responses, waiting

    def __next__(self) -> Finished:
        return next(self._responses)

    def close(self) -> None:
        """Abort the pending responses."""
        self._responses.close()

    def unfinished(self) -> dict[Slot, Response]:
        """Return the pending responses that have tokens, as they were at the last push. Callable from any thread."""
        jobs = [each.job for each in dict(self._waiting).values()]
        return {job.slot: job.unfinished for job in jobs if job.unfinished is not None}


class ServerClient:
    """The generating half of an engine that uses a vLLM server; a subclass updates the weights.

    Several threads may generate at once, also while the weights are updated: a push ends every open request, and each
    call continues from the tokens that it has. No request is open during a push, so a request sees one version.
    """

    shares_weights = False
    continuous_batching = True

    def __init__(
        self, setup: VllmSetup, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, address: Address
    ) -> None:
        self.version = 0
        self.address = address
        self._setup, self._model, self._tokenizer = setup, model, tokenizer
        self._http = http_client(address.url, address.token)
        self._drafts = DraftCounts()
        # Held while requests are sent, and from the start of a push until its end.
        self._gate = threading.RLock()
        self._open: list[Streams] = []
        self._starts = 0  # Restarts of the server so far.
        self._heard, self._closed = time.monotonic(), False
        # False from the start of a push until its end: the server may have part of the new weights.
        self._complete = False

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self.address.url

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Call:
        """Return the responses, as `Engine.generate`. After a restart of the server, lost tokens are generated again.

        Tokens of older weights are not lost: they continue under the weights of the restarted server.
        """
        waiting = {job.slot: _Unfinished(job) for job in jobs_of(prompts, sampling, slots)}
        return Call(self._responses(waiting, sampling), waiting)

    def _responses(self, waiting: dict[Slot, _Unfinished], sampling: Sampling) -> Generator[Finished, None, None]:
        deadline = None if sampling.deadline_s is None else time.monotonic() + sampling.deadline_s
        restarted = False
        while waiting:
            starts = self._starts
            try:
                with self._gate:
                    starts, version = self._starts, self.version
                    streams = self._send(list(waiting.values()), sampling)
                yield from self._attempt(streams, version, waiting, deadline, sampling.stop)
            except ServerLost as lost:
                if restarted or self._closed or not self._recover(starts):
                    remedy = "Run the same command" if self.address.own else "Start it again, then run the same command"
                    raise ServerLost(
                        f"{lost}; {len(waiting)} responses were open. {remedy}: training resumes from "
                        "the newest checkpoint"
                    ) from lost
                restarted = True
                for slot, each in waiting.items():
                    waiting[slot] = _Unfinished(each.job)

    def release(self) -> None:
        """Do nothing: the server has its own memory."""

    def take_drafts(self) -> DraftCounts:
        """Return the server's counts of speculative decoding since the last call."""
        if self._setup.drafts is None:
            return DraftCounts()
        before, self._drafts = self._drafts, counts_on(self._page("/metrics"))
        return self._drafts.since(before)

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        self._http.close()

    def _recover(self, starts: int) -> bool:
        """Restart the server, with the current weights; return False if this process must not.

        starts  value of `_starts` when the lost requests were sent: another thread may have restarted the server since
        """
        return False

    def _is_alive(self) -> bool:
        """Return False if the server's process is known to have ended."""
        return True

    def _send(self, waiting: Sequence[_Unfinished], sampling: Sampling) -> Streams:
        """Send the requests of all waiting jobs. Hold `_gate`."""
        self._require_version()
        self._heard = time.monotonic()
        streams = Streams(self.url, self.address.token, self._bodies(waiting, sampling))
        self._open.append(streams)
        return streams

    def _attempt(
        self,
        streams: Streams,
        version: int,
        waiting: dict[Slot, _Unfinished],
        deadline: float | None,
        stop: Callable[[], bool],
    ) -> Iterator[Finished]:
        """Yield responses as they finish, and remove them from `waiting`. Return early at a push. Raises ServerLost."""
        finish = "deadline"
        try:
            while waiting:
                left = WATCH_S if deadline is None else min(WATCH_S, deadline - time.monotonic())
                if left <= 0:
                    break
                if stop():
                    finish = INTERRUPTED
                    break
                if self._closed:
                    raise ServerLost(f"the client of vLLM at {self.url} was closed")
                try:
                    event = streams.events.get(timeout=left)
                except queue.Empty:
                    self._require_life()
                    continue
                # Of any call: the requests of a late call may wait in the server for those of an earlier one.
                self._heard = time.monotonic()
                if isinstance(event, Failed):
                    raise (ServerLost if event.lost else EngineError)(f"vLLM at {self.url}: {event.cause}")
                if isinstance(event, Switch):
                    for slot, each in waiting.items():
                        waiting[slot] = each.frozen(version)
                    return
                _add(waiting[event.slot], event)
                if event.finish is not None:
                    yield self._finished(waiting.pop(event.slot), event.finish, version)
        finally:
            streams.close()
            self._open.remove(streams)
        for slot in list(waiting):
            yield self._finished(waiting.pop(slot), finish, version)

    def _end_requests(self) -> None:
        """End the open requests of a paused server. Their calls continue when the caller releases `_gate`."""
        deadline = time.monotonic() + FLUSH_S
        for streams in list(self._open):
            streams.interrupt(max(deadline - time.monotonic(), 0.0))

    def _finished(self, done: _Unfinished, finish: str, version: int) -> Finished:
        return decoded(done.job, done.response(finish, version), self._tokenizer)

    def _bodies(self, waiting: Sequence[_Unfinished], sampling: Sampling) -> list[tuple[list[Slot], dict[str, Any]]]:
        """Return the requests: one for all new responses to a prompt, and one for each response to continue."""
        together: dict[Slot | int, list[Job]] = {}
        for job in (each.job for each in waiting):
            together.setdefault(job.slot if job.unfinished is not None else job.slot[0], []).append(job)
        return [
            (
                [job.slot for job in jobs],
                self._setup.sampling_options(jobs[0], sampling)
                | {
                    "model": MODEL_NAME,
                    "prompt": jobs[0].context_ids.tolist(),
                    "n": len(jobs),
                    "stream": True,
                    "return_token_ids": True,
                },
            )
            for jobs in together.values()
        ]

    def _require_life(self) -> None:
        if not self._is_alive():
            raise ServerLost("the vLLM server died")
        if time.monotonic() - self._heard > STALL_S:
            raise ServerLost(f"vLLM at {self.url} has sent nothing for {STALL_S:.0f} s")

    def _require_version(self) -> None:
        if not self._complete:
            raise EngineError(
                f"the vLLM server has no complete set of weights (the push after version {self.version} "
                "failed); call update_weights again"
            )
        held = {reply["version"] for reply in self._rpc("or1_version")}
        if held != {self.version}:
            raise ServerLost(
                f"vLLM at {self.url} has weights of version {held}, not {self.version}: it was "
                "restarted, or another run uses it too"
            )

    def _rpc(self, method: str, **arguments: Any) -> list[dict[str, Any]]:
        """Call a method of every worker of the server; return the replies."""
        return self._post("/collective_rpc", {"method": method, "kwargs": arguments})["results"]

    def _page(self, path: str) -> str:
        try:
            return self._http.get(self.url + path).raise_for_status().text
        except httpx.HTTPError as error:
            raise EngineError(f"vLLM at {self.url} does not show {path} ({error})") from error

    def _post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            reply = self._http.post(self.url + path, json=body)
        except httpx.TransportError as error:
            raise ServerLost(f"vLLM at {self.url} does not answer ({type(error).__name__}: {error})") from error
        if reply.status_code != 200:
            raise EngineError(f"vLLM at {self.url} refused {path} ({reply.status_code}): {reply.text[:500]}")
        return reply.json()


def _add(unfinished: _Unfinished, part: Part) -> None:
    unfinished.tokens += part.token_ids
    unfinished.logp += part.logp


def http_client(url: str, token: str) -> httpx.Client:
    """Return a client for all requests but completions, which `Streams` sends."""
    # No keep-alive: the server closes a connection after an error, and the next request would find it closed.
    once = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(headers=bearer(token), timeout=RPC_LIMIT_S, limits=once, trust_env=may_take_proxy(url))
