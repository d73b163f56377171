"""Concurrent streamed completions of a vLLM server, as parts in the order of their arrival."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import httpx

from or1.rollout.engine import Slot
from or1.rollout.vllm.process import bearer, may_take_proxy

CONNECT_S = 30.0


@cache
def certificates() -> ssl.SSLContext:
    """Return the certificates that clients trust. To load them takes 25 ms of a CPU, which each push would wait for."""
    return httpx.create_ssl_context()


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


Event = Part | Failed | Switch


class Streams:
    """A thread that POSTs every body to /v1/completions and passes each part of the replies to `put`.

    `close` drops open requests, which aborts them in vLLM.
    """

    def __init__(self, url: str, token: str, put: Callable[[Event], None]):
        self._put, self._url, self._token = put, url + "/v1/completions", token
        self._loop = asyncio.new_event_loop()
        # None: no request follows.
        self._bodies: asyncio.Queue[tuple[list[Slot], dict[str, Any]] | None] = asyncio.Queue()
        self._thread = threading.Thread(target=self._run, name="or1-vllm", daemon=True)
        self._thread.start()

    def send(self, slots: list[Slot], body: dict[str, Any]) -> None:
        """Send a request. slots[i] is choice i of the reply."""
        with contextlib.suppress(RuntimeError):  # Raised after an end of the loop, which `put` has been told.
            self._loop.call_soon_threadsafe(self._bodies.put_nowait, (slots, body))

    def close(self) -> None:
        """Drop open requests, and wait for the thread."""
        with contextlib.suppress(RuntimeError):  # Raised if the loop has just closed.
            self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join()

    def interrupt(self, limit_s: float) -> None:
        """End with a `Switch`, once the server is paused: it has aborted what it worked on and reports every token.

        A request that reached the server after the pause waits there without a token. Such requests are dropped after
        `limit_s` seconds. Send no request afterwards.
        """
        with contextlib.suppress(RuntimeError):  # Raised after an end of the loop.
            self._loop.call_soon_threadsafe(self._bodies.put_nowait, None)
        self._thread.join(limit_s)
        self.close()
        self._put(Switch())

    def _cancel(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._all())
        except asyncio.CancelledError:
            pass
        finally:
            self._loop.close()

    async def _all(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(None, connect=CONNECT_S)
        client = httpx.AsyncClient(
            headers=bearer(self._token),
            verify=certificates(),
            limits=limits,
            timeout=timeout,
            trust_env=may_take_proxy(self._url),
        )
        async with client, asyncio.TaskGroup() as tasks:
            while (request := await self._bodies.get()) is not None:
                tasks.create_task(self._one(client, *request))

    async def _one(self, client: httpx.AsyncClient, slots: list[Slot], body: dict[str, Any]) -> None:
        unfinished = set(slots)
        try:
            async with client.stream("POST", self._url, json=body) as reply:
                if reply.status_code != 200:
                    cause = (await reply.aread()).decode(errors="replace")[:500]
                    self._put(Failed(f"{reply.status_code}: {cause}", lost=reply.status_code >= 500))
                    return
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        self._note(json.loads(line[6:]), slots, unfinished)
        except httpx.HTTPError as error:
            self._put(Failed(f"the connection broke ({type(error).__name__}: {error})", lost=True))
            return
        except (ValueError, KeyError, TypeError) as error:
            # A malformed answer. Without this event the reader would wait until its timeout.
            self._put(Failed(f"an answer cannot be read ({type(error).__name__}: {error})", lost=True))
            return
        if unfinished:
            self._put(Failed("a stream ended before its responses", lost=True))

    def _note(self, chunk: dict[str, Any], slots: list[Slot], unfinished: set[Slot]) -> None:
        if "choices" not in chunk:
            self._put(Failed(f"{chunk.get('error', chunk)}", lost=True))
            return
        for choice in chunk["choices"]:
            slot, finish = slots[choice["index"]], choice["finish_reason"]
            token_ids = choice.get("token_ids") or []
            logp = (choice.get("logprobs") or {}).get("token_logprobs") or []
            # "abort" is the answer to a pause; the last tokens before the pause come with it.
            if len(token_ids) != len(logp) or finish not in (None, "stop", "length", "abort"):
                self._put(Failed(f"{len(token_ids)} tokens with {len(logp)} log-probs, finish {finish!r}", True))
                return
            self._put(Part(slot, token_ids, logp, None if finish == "abort" else finish))
            if finish is not None:
                unfinished.discard(slot)
