"""One vLLM server for all ranks: the main rank starts it and pushes the weights; each rank sends its own requests.

If the server dies during generation, the run ends: some ranks may not have noticed, and others may have all of their
responses. A push is collective, so a push may restart the server and send its new address to every rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from or1.config import VllmConfig
from or1.dist.world import World
from or1.model.export import named_weights
from or1.rollout.vllm.client import Address, ServerClient
from or1.rollout.vllm.drafts import DraftCounts
from or1.rollout.vllm.server import ServerEngine
from or1.rollout.vllm.setup import VllmSetup

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LeadingEngine(ServerEngine):
    """The main rank's engine.

    A server that or1 started listens on loopback, so all ranks must be on one machine. For several machines, start the
    server with `or1 serve` and set `rollout.vllm.url`.
    """

    def __init__(
        self,
        world: World,
        setup: VllmSetup,
        config: VllmConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        run_path: Path,
    ):
        self._world = world
        super().__init__(setup, config, model, tokenizer, run_path, clients=world.size)

    def update_weights(self, version: int) -> None:
        """Push the weights, and send the server's address to the other ranks. Collective."""
        super().update_weights(version)
        self._world.gather(json.dumps(self.address).encode())

    def _recover(self, starts: int) -> bool:
        return False

    def _is_generating(self) -> bool:
        return self._world.any(bool(self.lines))

    def _await_ranks(self) -> None:
        self._world.barrier()

    def _send_again(self, version: int) -> list[dict[str, Any]]:
        # The other ranks gather the weights once per push, so only the copy kept by the first attempt can be sent.
        return self._repeat(version)


class FollowingEngine(ServerClient):
    """The engine of every other rank: it helps to gather the weights, and the main rank sends them."""

    def __init__(
        self, world: World, setup: VllmSetup, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._world = world
        world.any(False)  # As in every push: no rank has open requests.
        super().__init__(setup, model, tokenizer, _gather_address(world, model), clients=world.size)
        self.take_version(0)

    def take_drafts(self) -> DraftCounts:
        """Return no counts: the main rank reads those of the server."""
        return DraftCounts()

    def update_weights(self, version: int) -> None:
        """Help to gather the weights, and receive the server's address from the main rank. Collective."""
        with self.gate:
            if self._world.any(bool(self.lines)):
                # The main rank pauses the server before the first barrier, and pushes after the second.
                self._world.barrier()
                self.end_requests()
                self._world.barrier()
            self.address = _gather_address(self._world, self._model)
            self.take_version(version)


def _gather_address(world: World, model: PreTrainedModel) -> Address:
    """Take part in one push of the main rank; return the server's address. Collective."""
    for _ in named_weights(model):
        pass
    return Address(*json.loads(world.gather(b"")[0]))
