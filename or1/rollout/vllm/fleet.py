"""Several vLLM servers as one engine: responses go where there is room, weights go to all of them.

The servers are started by `or1 serve` and named in `rollout.vllm.url`. A response depends on the weights and its seed,
so the server that makes it does not matter. A server that dies during a rollout is left out: the others generate its
responses again. Each push first asks every server whether it is there, so a server that was started again is back.

A push in the middle of a call pauses all servers, sends the weights to each, and then lets every response continue. So
the servers have one version at a time, and a response may move between them.

On several ranks the main rank pushes, and tells the others after each push which servers have the weights.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from or1.config import VllmConfig
from or1.core.errors import EngineError, ServerLost
from or1.core.terminal import tell
from or1.core.types import Prompt, Response
from or1.dist.world import World
from or1.model.export import named_weights
from or1.rollout.dealing import Given
from or1.rollout.engine import Sampling, Slot, Supply, jobs_of
from or1.rollout.vllm.client import Address, ServerClient
from or1.rollout.vllm.drafts import DraftCounts
from or1.rollout.vllm.sending import Call, Sending, Server
from or1.rollout.vllm.server import ServerEngine, token_of_another_server
from or1.rollout.vllm.setup import VllmSetup

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ANSWER_S = 30.0
"""Longest time that a server may take to say that it is there."""


class Fleet:
    """An engine on several servers.

    servers  one client for each server of `rollout.vllm.url`, in that order
    live     those that have the weights of the last push and have not been lost since
    gate     the gate of all servers, see `ServerClient`
    """

    shares_weights = False
    continuous_batching = True
    ranks_per_model = 1

    def __init__(self, world: World, servers: Sequence[ServerClient]):
        self._world, self.servers, self.live = world, list(servers), list(servers)
        self.version, self.gate = 0, threading.RLock()
        for server in self.servers:
            server.gate = self.gate

    @property
    def batch_size(self) -> int:
        """Most responses that a call of this process has open at all servers together."""
        return self.servers[0].batch_size * len(self.servers)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Call:
        """Return the responses, as `Engine.generate`."""
        return self.generate_from(Given(jobs_of(prompts, sampling, slots)), sampling)

    def generate_from(self, supply: Supply, sampling: Sampling) -> Call:
        """Return the responses, as `TakingEngine.generate_from`. Raises ServerLost when the last server is lost."""
        with self.gate:
            live = list(self.live)
        if not live:
            raise ServerLost("no vLLM server is left; start them again, then run the same command")
        return Call(Sending(live, supply, sampling, self.servers[0].batch_size, self._lost))

    def update_weights(self, version: int) -> None:
        """Push the weights to every server that answers, as `Engine.update_weights`. Collective."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Return the number of servers that have the weights."""
        return {"rollout/servers": float(len(self.live))}

    def take_drafts(self) -> DraftCounts:
        """Return the servers' counts of speculative decoding since the last call."""
        counts = DraftCounts()
        for server in self.live:
            with contextlib.suppress(EngineError):  # Of a server that has died since.
                counts = DraftCounts(*(a + b for a, b in zip(counts, server.take_drafts(), strict=True)))
        return counts

    def release(self) -> None:
        """Do nothing: the servers have their own memory."""

    def close(self) -> None:
        """Close the connections, and delete pushed weights."""
        for server in self.servers:
            server.close()

    def _is_generating(self) -> bool:
        """Return True if requests of any rank are open. Collective."""
        return self._world.any(any(server.lines for server in self.servers))

    def _end_requests(self) -> None:
        """End the open requests of all ranks at the paused servers. Collective."""
        self._world.barrier()
        for server in self.servers:
            server.end_requests()
        self._world.barrier()

    def _lost(self, server: Server, cause: ServerLost, starts: int, open_: int, left: int) -> None:
        with self.gate:
            self.live = [each for each in self.live if each is not server]
        if not left:
            raise server.loss(cause, open_) from cause
        tell(f"or1: {cause}. The other {left} of {len(self.servers)} servers go on with its responses")


class LeadingFleet(Fleet):
    """The main rank's engine, which pushes."""

    def __init__(
        self,
        world: World,
        setup: VllmSetup,
        config: VllmConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        run_path: Path,
    ):
        self._engines = [
            ServerEngine(
                setup,
                config.model_copy(update={"url": (url,)}),
                model,
                tokenizer,
                run_path,
                clients=world.size,
                push_now=False,
            )
            for url in config.url or ()
        ]
        super().__init__(world, self._engines)
        self.update_weights(0)

    def update_weights(self, version: int) -> None:
        """Push, as `Fleet.update_weights`. Every server confirms the version and drops its cache of old weights."""
        with self.gate:
            self.live.clear()
            there = [engine for engine in self._engines if _answers(engine)]
            if not there:
                raise ServerLost(
                    f"none of the {len(self.servers)} vLLM servers answers; start them, run the same command"
                )
            if self._is_generating():
                for engine in there:
                    engine.pause()
                self._end_requests()
            self._push(there, version)
            if missing := [engine.url for engine in self._engines if engine not in self.live]:
                tell(f"or1: version {version} of the weights is not at {', '.join(missing)}")
            self._world.gather(json.dumps([engine.url for engine in self.live]).encode())
            self.version = version

    def _push(self, there: Sequence[ServerEngine], version: int) -> None:
        """Send the weights to the servers that answer, and leave out those that fail."""
        for engine in self._engines:
            engine.drop_version()
            engine.absent = engine not in there
        # One file serves all servers. Otherwise each is sent the weights, and all ranks gather them each time.
        sends = 1 if there[0].pushes_file else len(there)
        self._world.gather(json.dumps(sends).encode())
        for number, engine in enumerate(there):
            try:
                engine.push(version, again=number >= sends)
                self.live.append(engine)
            except ServerLost as cause:
                engine.absent = True
                tell(f"or1: {cause}. It is left out until the next push")
        if not self.live:
            raise ServerLost(f"no vLLM server took version {version}; start them again, then run the same command")


class FollowingFleet(Fleet):
    """The engine of every other rank: it helps to gather the weights, and the main rank sends them."""

    def __init__(
        self,
        world: World,
        setup: VllmSetup,
        config: VllmConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self._model = model
        addresses = [Address(url, token_of_another_server(url), own=False) for url in config.url or ()]
        super().__init__(
            world, [ServerClient(setup, model, tokenizer, address, clients=world.size) for address in addresses]
        )
        self.update_weights(0)

    def take_drafts(self) -> DraftCounts:
        """Return no counts: the main rank reads those of the servers."""
        return DraftCounts()

    def update_weights(self, version: int) -> None:
        """Help to gather the weights, and learn which servers have them. Collective."""
        with self.gate:
            self.live.clear()
            if self._is_generating():
                self._end_requests()
            for _ in range(json.loads(self._world.gather(b"")[0])):
                for _ in named_weights(self._model):
                    pass
            with_weights = json.loads(self._world.gather(b"")[0])
            for server in self.servers:
                server.absent = server.url not in with_weights
            self.live = [server for server in self.servers if not server.absent]
            for server in self.live:
                server.take_version(version)
            self.version = version


def _answers(server: ServerEngine) -> bool:
    """Return True if the server answers. Raises EngineError if it refuses, as for a wrong token."""
    try:
        server.ask("/health", _ANSWER_S)
    except ServerLost:
        return False
    return True
