"""A running server with an OpenAI-compatible API, such as vLLM's: for measuring, since it cannot be given weights."""

from __future__ import annotations

import email.message
import http.client
import json
import math
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from or1.config import EndpointConfig
from or1.core.errors import EndpointError
from or1.core.seeds import seed_of_32_bits
from or1.core.terminal import tell
from or1.core.types import Prompt, Response
from or1.rollout.engine import Finished, Sampling, Slot

_MAY_PASS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE_S = 60.0


class EndpointEngine:
    """Asks `POST {url}/chat/completions` once per response; the server applies its own chat template.

    A server reports how many tokens a response has, not which: ids are -1 and log-probs NaN. What it sends apart as
    reasoning is put back between <think> tags.
    """

    def __init__(self, config: EndpointConfig):
        self._config = config
        self._url = (config.url or "").rstrip("/")
        local = urlsplit(self._url).hostname in ("localhost", "127.0.0.1", "::1")
        handlers = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_SameOrigin, *handlers)
        self._telling, self._told = threading.Lock(), -math.inf
        self.version = 0
        self.model = config.model or self._only_model()

    def release(self) -> None:
        """See `Engine.release`; the server's memory is its own."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, begun: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """See `Engine.generate`. Raises EndpointError when a request fails for good; the others are given up."""
        if begun is not None:
            raise EndpointError(
                f"{self._url} cannot go on with responses of another policy; partial rollouts need "
                "rollout.engine, without [endpoint]"
            )
        jobs: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        for p in range(len(prompts)):
            for s in range(sampling.samples):
                jobs.put((p, s))
        total = jobs.qsize()
        results: queue.SimpleQueue[Finished | EndpointError] = queue.SimpleQueue()
        stopped = threading.Event()

        def serve() -> None:
            while not stopped.is_set():
                try:
                    p, s = jobs.get_nowait()
                except queue.Empty:
                    return
                outcome = EndpointError("a request ended in an error of or1's own; its traceback stands above")
                try:
                    outcome = Finished(p, s, self._respond(prompts[p], sampling, p, s))
                except EndpointError as error:
                    outcome = error
                finally:
                    results.put(outcome)

        try:
            # Not an executor: the interpreter waits for its threads, and a request may take an hour.
            for _ in range(min(self._config.concurrency, total)):
                threading.Thread(target=serve, name="or1-endpoint", daemon=True).start()
            for _ in range(total):
                outcome = results.get()
                if isinstance(outcome, EndpointError):
                    raise outcome
                yield outcome
        finally:
            stopped.set()

    def update_weights(self, version: int) -> None:
        """Raises EndpointError: another's server keeps its weights."""
        raise EndpointError(f"{self._url} serves its own weights; train with rollout.engine, without [endpoint]")

    def close(self) -> None:
        """There is nothing to end."""

    def _respond(self, prompt: Prompt, sampling: Sampling, p: int, s: int) -> Response:
        seed = seed_of_32_bits(sampling.seed, p, s)
        answer = self._ask(
            "/chat/completions",
            {
                "model": self.model,
                "messages": list(prompt.messages),
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": seed,
            },
        )
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
            reasoning = message.get("reasoning_content") or message.get("reasoning")
            if reasoning:
                closed = f"</think>{text}" if text else ""
                text = f"<think>{reasoning}{closed}"
            tokens = int(answer.get("usage", {}).get("completion_tokens", 0))
            finish = "length" if choice.get("finish_reason") == "length" else "stop"
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EndpointError(f"{self._url} answered in no known form: {json.dumps(answer)[:300]}") from error
        # Half a surrogate pair is legal in JSON and in no file.
        text = text.encode("utf-8", "replace").decode("utf-8")
        return Response(np.full(tokens, -1, np.int32), np.full(tokens, np.nan, np.float32), finish, self.version, text)

    def _only_model(self) -> str:
        listed = self._ask("/models", None)
        names = [each.get("id") for each in listed.get("data", []) if isinstance(each, Mapping)]
        if len(names) != 1:
            raise EndpointError(f"{self._url} has the models {names}; choose one with endpoint.model")
        return names[0]

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """One request, repeated while the refusal may pass. Raises EndpointError."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self._config.key_env):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        for attempt in range(self._config.retries + 1):
            try:
                with self._opener.open(request, timeout=self._config.timeout_s) as reply:
                    return json.load(reply)
            except EndpointError:
                raise
            except urllib.error.HTTPError as error:
                cause = f"{error.code} {error.read(500).decode('utf-8', 'replace')}"
                pause = _asked_pause(error.headers)
                if error.code not in _MAY_PASS:
                    break
            except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
                cause, pause = f"{type(error).__name__}: {error}", None
            if attempt < self._config.retries:
                pause = min(pause if pause is not None else 2.0**attempt, _LONGEST_PAUSE_S)
                self._tell(
                    f"{self._url}{path}: {cause[:200]}; attempt {attempt + 2} of {self._config.retries + 1} in "
                    f"{pause:g} s"
                )
                time.sleep(pause)
        raise EndpointError(
            f"{self._url}{path} failed after {attempt + 1} attempts: {cause}; look at the server, or "
            "raise endpoint.timeout_s or endpoint.retries. The same command goes on from here"
        )

    def _tell(self, text: str) -> None:
        """A line on stderr, one a second at most: requests that run side by side fail side by side."""
        with self._telling:
            now = time.monotonic()
            if now - self._told >= 1:
                self._told = now
                tell(f"or1: {text}")


class _SameOrigin(urllib.request.HTTPRedirectHandler):
    """Follows a redirect within one server only: urllib would send the API key along to any other."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request that follows. Raises EndpointError if it is for another scheme, host or port."""
        if _origin(req.full_url) != _origin(newurl):
            raise EndpointError(
                f"{req.full_url} redirects to {newurl}, another server, which does not get the API "
                "key; if that is the right one, set endpoint.url to its address"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _asked_pause(headers: email.message.Message) -> float | None:
    """Seconds of a Retry-After header."""
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None
