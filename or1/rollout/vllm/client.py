"""Generation with a running vLLM server, over HTTP."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import numpy as np

from or1.core.errors import EngineError, ServerLost
from or1.core.types import Prompt, Response
from or1.rollout.engine import INTERRUPTED, Finished, Job, Sampling, Slot, continued, decoded, jobs_of
from or1.rollout.vllm.drafts import DraftCounts, counts_on
from or1.rollout.vllm.process import MODEL_NAME, bearer, may_take_proxy
from or1.rollout.vllm.setup import VllmSetup
from or1.rollout.vllm.streams import Failed, Part, Streams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WATCH_S = 2.0
"""Seconds between checks of a silent server, so also the delay after which a dead server is noticed."""
STALL_S = 300.0
"""A live server that sends nothing for this long hangs. Prefilling the longest prompts takes seconds."""
RPC_LIMIT_S = 600.0


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


class ServerClient:
    """The generating half of an engine that uses a vLLM server; a subclass updates the weights."""

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
        # False from the start of a push until its end: the server may have part of the new weights.
        self._complete = False

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self.address.url

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """Yield responses, as `Engine.generate`. After a restart of the server, lost tokens are generated again."""
        waiting = {job.slot: _Unfinished(job) for job in jobs_of(prompts, sampling, slots)}
        deadline = None if sampling.deadline_s is None else time.monotonic() + sampling.deadline_s
        restarted = False
        while waiting:
            try:
                self._require_version()
                yield from self._attempt(waiting, sampling, deadline)
            except ServerLost as lost:
                if restarted or not self._recover():
                    remedy = "Run the same command" if self.address.own else "Start it again, then run the same command"
                    raise ServerLost(
                        f"{lost}; {len(waiting)} responses were open. {remedy}: training resumes from "
                        "the newest checkpoint"
                    ) from lost
                restarted = True
                waiting = {slot: _Unfinished(each.job) for slot, each in waiting.items()}

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
        self._http.close()

    def _recover(self) -> bool:
        """Restart the server, with the current weights; return False if this process must not."""
        return False

    def _is_alive(self) -> bool:
        """Return False if the server's process is known to have ended."""
        return True

    def _attempt(
        self, waiting: dict[Slot, _Unfinished], sampling: Sampling, deadline: float | None
    ) -> Iterator[Finished]:
        """Yield responses as they finish, and remove them from `waiting`. Raises ServerLost."""
        streams = Streams(self.url, self.address.token, self._bodies(list(waiting.values()), sampling))
        heard, finish = time.monotonic(), "deadline"
        try:
            while waiting:
                left = WATCH_S if deadline is None else min(WATCH_S, deadline - time.monotonic())
                if left <= 0:
                    break
                if sampling.stop():
                    finish = INTERRUPTED
                    break
                try:
                    event = streams.events.get(timeout=left)
                except queue.Empty:
                    self._require_life(heard)
                    continue
                heard = time.monotonic()
                if isinstance(event, Failed):
                    raise (ServerLost if event.lost else EngineError)(f"vLLM at {self.url}: {event.cause}")
                _add(waiting[event.slot], event)
                if event.finish is not None:
                    yield self._finished(waiting.pop(event.slot), event.finish)
        finally:
            streams.close()
        for slot in list(waiting):
            yield self._finished(waiting.pop(slot), finish)

    def _finished(self, done: _Unfinished, finish: str) -> Finished:
        return decoded(done.job, done.response(finish, self.version), self._tokenizer)

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

    def _require_life(self, heard: float) -> None:
        if not self._is_alive():
            raise ServerLost("the vLLM server died")
        if time.monotonic() - heard > STALL_S:
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
