"""Generation with a running vLLM server, over HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx

from or1.core.errors import EngineError, ServerLost
from or1.core.types import Prompt, Response
from or1.rollout.dealing import Given
from or1.rollout.engine import Finished, Sampling, Slot, Supply, jobs_of
from or1.rollout.vllm.process import bearer, may_take_proxy
from or1.rollout.vllm.sending import Sending, Server
from or1.rollout.vllm.setup import VllmSetup

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


class ServerClient:
    """The generating half of an engine that uses a vLLM server; a subclass updates the weights.

    clients  number of ranks that use the server
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
        # False from the start of a push until its end: the server may have part of the new weights.
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
        """Most responses that this process has open at the server, which its other clients use as much."""
        return max(-(-self.setup.batch_size // self.clients), 1)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """Yield responses, as `Engine.generate`. After a restart of the server, lost tokens are generated again."""
        yield from self.generate_from(Given(jobs_of(prompts, sampling, slots)), sampling)

    def generate_from(self, supply: Supply, sampling: Sampling) -> Iterator[Finished]:
        """Yield responses, as `TakingEngine.generate_from`; restart the server once if this process may."""
        restarted = False

        def lost(server: Server, cause: ServerLost, open_: int, left: int) -> Server:
            nonlocal restarted
            if restarted or not self._recover():
                raise self.loss(cause, open_) from cause
            restarted = True
            return server

        yield from Sending([self], supply, sampling, self.batch_size, lost).run()

    def loss(self, cause: ServerLost, open_: int) -> ServerLost:
        """Return the error of a lost server, with the remedy. open_: number of responses that were open."""
        remedy = "Run the same command" if self.address.own else "Start it again, then run the same command"
        return ServerLost(
            f"{cause}; {open_} responses were open. {remedy}: training resumes from the newest checkpoint"
        )

    def release(self) -> None:
        """Do nothing: the server has its own memory."""

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _recover(self) -> bool:
        """Restart the server, with the current weights; return False if this process must not."""
        return False

    def _is_alive(self) -> bool:
        """Return False if the server's process is known to have ended."""
        return True

    def require_life(self, heard: float) -> None:
        """Raise ServerLost if the server is dead, or has sent nothing since `heard` for too long."""
        if not self._is_alive():
            raise ServerLost("the vLLM server died")
        if time.monotonic() - heard > STALL_S:
            raise ServerLost(f"vLLM at {self.url} has sent nothing for {STALL_S:.0f} s")

    def require_version(self) -> None:
        """Raise EngineError without complete weights, ServerLost if the server has those of another version."""
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

    def take_version(self, version: int) -> None:
        """Note that another process has pushed `version` to the server."""
        self.version, self._complete = version, True

    def ask(self, path: str, limit_s: float) -> None:
        """Request a path. Raises ServerLost without an answer within `limit_s`, EngineError if the server refuses."""
        try:
            reply = self._http.get(self.url + path, timeout=limit_s)
        except httpx.TransportError as error:
            raise ServerLost(f"vLLM at {self.url} does not answer ({type(error).__name__}: {error})") from error
        if reply.status_code != 200:
            raise EngineError(f"vLLM at {self.url} refused {path} ({reply.status_code}): {reply.text[:500]}")

    def _rpc(self, method: str, **arguments: Any) -> list[dict[str, Any]]:
        """Call a method of every worker of the server; return the replies."""
        return self._post("/collective_rpc", {"method": method, "kwargs": arguments})["results"]

    def _post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            reply = self._http.post(self.url + path, json=body)
        except httpx.TransportError as error:
            raise ServerLost(f"vLLM at {self.url} does not answer ({type(error).__name__}: {error})") from error
        if reply.status_code != 200:
            raise EngineError(f"vLLM at {self.url} refused {path} ({reply.status_code}): {reply.text[:500]}")
        return reply.json()


def http_client(url: str, token: str) -> httpx.Client:
    """Return a client for all requests but completions, which `Streams` sends."""
    # No keep-alive: the server closes a connection after an error, and the next request would find it closed.
    once = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(headers=bearer(token), timeout=RPC_LIMIT_S, limits=once, trust_env=may_take_proxy(url))
