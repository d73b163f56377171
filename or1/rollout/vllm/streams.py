"""Concurrent streamed completions of a vLLM server, as one queue of parts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx

from or1.rollout.engine import Slot
from or1.rollout.vllm.process import bearer, may_take_proxy

CONNECT_S = 30.0


class Part(NamedTuple):
    """New tokens of one slot.

    logp    log-probabilities of the tokens, nats
    finish  "stop" or "length" for the last part of a slot, else None
    """

    slot: Slot
    token_ids: list[int]
    logp: list[float]
    finish: str | None


class Failed(NamedTuple):
    """A failed request. `lost` is True if the server is at fault, so that a restart may help."""

    cause: str
    lost: bool


class Switch(NamedTuple):
    """The server changes its weights: every part before this event is of the old ones, and no part follows."""


class Streams:
    """A thread that POSTs every body to /v1/completions and puts the replies into `events`.

    bodies  (slots, body) pairs; slots[i] is choice i of the reply to the body

    `close` drops open requests, which aborts them in vLLM.
    """

    def __init__(self, url: str, token: str, bodies: Sequence[tuple[list[Slot], dict[str, Any]]]):
        self.events: queue.SimpleQueue[Part | Failed | Switch] = queue.SimpleQueue()
        self._url, self._token, self._bodies = url + "/v1/completions", token, bodies
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="or1-vllm", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Drop open requests, and wait for the thread."""
        with contextlib.suppress(RuntimeError):  # Raised if the loop has just closed.
            self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join()

    def interrupt(self, limit_s: float) -> None:
        """End with a `Switch`, once the server is paused: it has aborted what it worked on and reports every token.

        A request that reached the server after the pause waits there without a token. Such requests are dropped after
        `limit_s` seconds.
        """
        self._thread.join(limit_s)
        self.close()
        self.events.put(Switch())

    def _cancel(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._all())
        except asyncio.CancelledError:
            pass
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            # A truncated or malformed answer. Without this event the reader of `events` would wait until its timeout.
            self.events.put(Failed(f"an answer cannot be read ({type(error).__name__}: {error})", lost=True))
        finally:
            self._loop.close()

    async def _all(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(None, connect=CONNECT_S)
        async with httpx.AsyncClient(
            headers=bearer(self._token), limits=limits, timeout=timeout, trust_env=may_take_proxy(self._url)
        ) as client:
            await asyncio.gather(*(self._one(client, slots, body) for slots, body in self._bodies))

    async def _one(self, client: httpx.AsyncClient, slots: list[Slot], body: dict[str, Any]) -> None:
        unfinished = set(slots)
        try:
            async with client.stream("POST", self._url, json=body) as reply:
                if reply.status_code != 200:
                    cause = (await reply.aread()).decode(errors="replace")[:500]
                    self.events.put(Failed(f"{reply.status_code}: {cause}", lost=reply.status_code >= 500))
                    return
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        self._note(json.loads(line[6:]), slots, unfinished)
        except httpx.TransportError as error:
            self.events.put(Failed(f"the connection broke ({type(error).__name__}: {error})", lost=True))
            return
        if unfinished:
            self.events.put(Failed("a stream ended before its responses", lost=True))

    def _note(self, chunk: dict[str, Any], slots: list[Slot], unfinished: set[Slot]) -> None:
        if "choices" not in chunk:
            self.events.put(Failed(f"{chunk.get('error', chunk)}", lost=True))
            return
        for choice in chunk["choices"]:
            slot, finish = slots[choice["index"]], choice["finish_reason"]
            token_ids = choice.get("token_ids") or []
            logp = (choice.get("logprobs") or {}).get("token_logprobs") or []
            # "abort" is the answer to a pause; the last tokens before the pause come with it.
            if len(token_ids) != len(logp) or finish not in (None, "stop", "length", "abort"):
                self.events.put(Failed(f"{len(token_ids)} tokens with {len(logp)} log-probs, finish {finish!r}", True))
                return
            self.events.put(Part(slot, token_ids, logp, None if finish == "abort" else finish))
            if finish is not None:
                unfinished.discard(slot)
