"""Generation with a running vLLM server, over HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx

from or1.core.errors import EngineError, ServerLost
from or1.core.types import Prompt, Response
from or1.rollout.dealing import Given
from or1.rollout.engine import Sampling, Slot, Supply, jobs_of
from or1.rollout.vllm.drafts import DraftCounts, counts_on
from or1.rollout.vllm.process import bearer, may_take_proxy
from or1.rollout.vllm.sending import Call, Line, Sending, Server
from or1.rollout.vllm.setup import VllmSetup
from or1.rollout.vllm.streams import certificates

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


class ServerClient:
    """The generating half of an engine that uses a vLLM server; a subclass updates the weights.

    Several threads may generate at once, also while the weights are updated: a push ends every open request, and each
    call continues from the tokens that it has. No request is open during a push, so a request sees one version.

    clients  number of ranks that use the server
    gate     held while requests are sent, and from the start of a push until its end; the servers of a fleet share one
    starts   restarts of the server so far
    heard    time of the server's last event, by time.monotonic
    lines    requests of all calls
    absent   True if this is one of several servers, and the last push left it out
    """

    shares_weights = False
    continuous_batching = True
    ranks_per_model = 1

    def __init__(
        self,
        setup: VllmSetup,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        address: Address,
        *,
        clients: int = 1,
    ) -> None:
        self.version = 0
        self.address = address
        self.setup, self.tokenizer, self._model = setup, tokenizer, model
        self.clients = clients
        self._http = http_client(address.url, address.token)
        self._drafts = DraftCounts()
        self.gate = threading.RLock()
        self.lines: list[Line] = []
        self.starts, self.heard = 0, time.monotonic()
        self.absent, self._closed = False, False
        self._complete = False

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self.address.url

    @property
    def token(self) -> str:
        """The bearer token that the server checks."""
        return self.address.token

    @property
    def batch_size(self) -> int:
        """Most responses that a call of this process has open at the server, which its other clients use as much."""
        return max(-(-self.setup.batch_size // self.clients), 1)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Call:
        """Return the responses, as `Engine.generate`. After a restart of the server, lost tokens are generated again.

        Tokens of older weights are not lost: they continue under the weights of the restarted server.
        """
        return self.generate_from(Given(jobs_of(prompts, sampling, slots)), sampling)

    def generate_from(self, supply: Supply, sampling: Sampling) -> Call:
        """Return the responses, as `TakingEngine.generate_from`; restart the server once if this process may."""
        restarted = False

        def lost(server: Server, cause: ServerLost, starts: int, open_: int, left: int) -> Server:
            nonlocal restarted
            if restarted or self._closed or not self._recover(starts):
                raise self.loss(cause, open_) from cause
            restarted = True
            return server

        return Call(Sending([self], supply, sampling, self.batch_size, lost))

    def loss(self, cause: ServerLost, open_: int) -> ServerLost:
        """Return the error of a lost server, with the remedy. open_: number of responses that were open."""
        remedy = "Run the same command" if self.address.own else "Start it again, then run the same command"
        return ServerLost(
            f"{cause}; {open_} responses were open. {remedy}: training resumes from the newest checkpoint"
        )

    def release(self) -> None:
        """Do nothing: the server has its own memory."""

    def take_drafts(self) -> DraftCounts:
        """Return the server's counts of speculative decoding since the last call."""
        if self.setup.drafts is None:
            return DraftCounts()
        before, self._drafts = self._drafts, counts_on(self._page("/metrics"))
        return self._drafts.since(before)

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        self._http.close()

    def end_requests(self) -> None:
        """End the open requests of a paused server. Their calls continue when the caller releases `gate`."""
        deadline = time.monotonic() + FLUSH_S
        for line in list(self.lines):
            line.interrupt(max(deadline - time.monotonic(), 0.0))

    def _recover(self, starts: int) -> bool:
        """Restart the server, with the current weights; return False if this process must not.

        starts  value of `starts` when the lost requests were sent: another thread may have restarted the server since
        """
        return False

    def _is_alive(self) -> bool:
        """Return False if the server's process is known to have ended."""
        return True

    def require_life(self) -> None:
        """Raise ServerLost if the server is dead, or has sent nothing for too long, or this client was closed."""
        if self._closed:
            raise ServerLost(f"the client of vLLM at {self.url} was closed")
        if not self._is_alive():
            raise ServerLost("the vLLM server died")
        if time.monotonic() - self.heard > STALL_S:
            raise ServerLost(f"vLLM at {self.url} has sent nothing for {STALL_S:.0f} s")

    def require_version(self) -> None:
        """Raise EngineError without complete weights, ServerLost if the server has those of another version."""
        if self.absent:
            raise ServerLost(f"vLLM at {self.url} did not take the weights of the last push")
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

    def drop_version(self) -> None:
        """Note that a push begins: until its end the server may have part of the new weights."""
        self._complete = False

    def take_version(self, version: int) -> None:
        """Note that `version` was pushed to the server."""
        self.version, self._complete, self.absent = version, True, False

    def ask(self, path: str, limit_s: float) -> None:
        """Request a path. Raises ServerLost without an answer within `limit_s`, EngineError if the server refuses."""
        try:
            reply = self._http.get(self.url + path, timeout=limit_s)
        except httpx.TransportError as error:
            raise ServerLost(f"vLLM at {self.url} does not answer ({type(error).__name__}: {error})") from error
        if reply.status_code != 200:
            raise self._refused(path, reply)

    def _refused(self, path: str, reply: httpx.Response) -> EngineError:
        """Return the error of a request that the server did not accept; ServerLost if its engine process has died."""
        problem = f"vLLM at {self.url} refused {path} ({reply.status_code}): {reply.text[:500]}"
        # The API process answers a little longer than the engine process lives.
        return (ServerLost if "EngineCore encountered an issue" in reply.text else EngineError)(problem)

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
            raise self._refused(path, reply)
        return reply.json()


def http_client(url: str, token: str) -> httpx.Client:
    """Return a client for all requests but completions, which `Streams` sends."""
    # No keep-alive: the server closes a connection after an error, and the next request would find it closed.
    once = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(
        headers=bearer(token), verify=certificates(), timeout=RPC_LIMIT_S, limits=once, trust_env=may_take_proxy(url)
    )
