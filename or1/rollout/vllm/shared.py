"""One vLLM server for all ranks: the main one starts it and pushes the weights, each sends it its own prompts.

If it dies while they generate, the run ends: only some ranks may have noticed, and others may have what they need. A
push, which all take part in, restarts it and tells all where it is now.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from or1.dist.world import World
from or1.model.export import named_weights
from or1.rollout.vllm.server import ServerEngine, http_client
from or1.rollout.vllm.setup import VllmSetup

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LeadingEngine(ServerEngine):
    """The main rank's. A server that or1 started listens on loopback, so its ranks must be on one machine; for more,
    `or1 serve` elsewhere and `rollout.vllm.url`."""

    _alone = False

    def __init__(self, world: World, *arguments: Any):
        self._world = world
        super().__init__(*arguments)

    def update_weights(self, version: int) -> None:
        """See `Engine.update_weights`. Collective."""
        super().update_weights(version)
        self._world.gather(json.dumps([self.url, self._token, self._own]).encode())

    def _send_again(self, version: int) -> list[dict[str, Any]]:
        # The others take part in gathering the weights once a push: only what the first attempt kept can be sent.
        return self._repeat(version)


class FollowingEngine(ServerEngine):
    """That of every other rank: it takes part in gathering the weights and leaves sending them to the main rank."""

    _alone = False

    def __init__(
        self, world: World, setup: VllmSetup, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._world, self._setup, self._model, self._tokenizer = world, setup, model, tokenizer
        self.process = None
        self.update_weights(0)
        self._http = http_client(self.url, self._token)

    def update_weights(self, version: int) -> None:
        """See `Engine.update_weights`. Collective."""
        for _ in named_weights(self._model):
            pass
        self._url, self._token, self._own = json.loads(self._world.gather(b"")[0])
        self.version, self._whole = version, True

    def close(self) -> None:
        """See `Engine.close`."""
        self._http.close()
