"""Engine for a running server with an OpenAI-compatible API: for evaluation only, since its weights are fixed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from or1.config import EndpointConfig
from or1.core.errors import EndpointError
from or1.core.seeds import seed_of_32_bits
from or1.core.types import Prompt, Response
from or1.rollout.chat_client import ChatClient, at_once
from or1.rollout.engine import Finished, Sampling, Slot


class EndpointEngine:
    """An engine that sends one `POST {url}/chat/completions` per response; the server applies its own chat template.

    A server reports only the number of tokens of a response, so ids are -1 and log-probs NaN. A separate reasoning
    field of an answer is put back into the text, between <think> tags.
    """

    shares_weights = False
    continuous_batching = True

    def __init__(self, config: EndpointConfig, chat_template: Mapping[str, Any] | None = None):
        self._concurrency = config.concurrency
        # Servers of vLLM and SGLang take the arguments of a chat template; others refuse a key that they do not know.
        self._template = {"chat_template_kwargs": dict(chat_template)} if chat_template else {}
        self._client = ChatClient(config)
        self.version = 0
        self.model = self._client.model

    def release(self) -> None:
        """Do nothing: the server has its own memory."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """Yield responses, as `Engine.generate`. Raises EndpointError, and drops the other requests, if one fails."""
        if slots is not None:
            raise EndpointError(
                f"{self._client.url} cannot continue unfinished responses; partial rollouts need rollout.engine, "
                "without [endpoint]"
            )
        jobs = [(p, s) for p in range(len(prompts)) for s in range(sampling.samples)]
        yield from at_once(
            jobs, lambda job: Finished(*job, self._respond(prompts[job[0]], sampling, *job)), self._concurrency
        )

    def update_weights(self, version: int) -> None:
        """Raise EndpointError: the server's weights are fixed."""
        raise EndpointError(f"{self._client.url} serves its own weights; train with rollout.engine, without [endpoint]")

    def close(self) -> None:
        """Do nothing: the engine has no processes."""

    def _respond(self, prompt: Prompt, sampling: Sampling, p: int, s: int) -> Response:
        reply = self._client.chat(
            prompt.messages,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed_of_32_bits(sampling.seed, p, s),
            **self._template,
        )
        return Response(
            token_ids=np.full(reply.tokens, -1, np.int32),
            logp=np.full(reply.tokens, np.nan, np.float32),
            finish=reply.finish,
            version=self.version,
            text=reply.text,
        )
