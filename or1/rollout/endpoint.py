"""Engine for a running server with an OpenAI-compatible API: for evaluation only, since its weights are fixed."""

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

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses of temporary failures."""
_LONGEST_PAUSE_S = 60.0


class EndpointEngine:
    """An engine that sends one `POST {url}/chat/completions` per response; the server applies its own chat template.

    A server reports only the number of tokens of a response, so ids are -1 and log-probs NaN. A separate reasoning
    field of an answer is put back into the text, between <think> tags.
    """

    shares_weights = False
    continuous_batching = True

    def __init__(self, config: EndpointConfig, chat_template: Mapping[str, Any] | None = None):
        self._config = config
        # Servers of vLLM and SGLang take the arguments of a chat template; others refuse a key that they do not know.
        self._template = {"chat_template_kwargs": dict(chat_template)} if chat_template else {}
        self._url = (config.url or "").rstrip("/")
        local = urlsplit(self._url).hostname in ("localhost", "127.0.0.1", "::1")
        handlers = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_SameOrigin, *handlers)
        self._tell_lock, self._last_told = threading.Lock(), -math.inf
        self.version = 0
        self.model = config.model or self._only_model()

    def release(self) -> None:
        """Do nothing: the server has its own memory."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """Yield responses, as `Engine.generate`. Raises EndpointError, and drops the other requests, if one fails."""
        if slots is not None:
            raise EndpointError(
                f"{self._url} cannot continue unfinished responses; partial rollouts need rollout.engine, without "
                "[endpoint]"
            )
        jobs: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        for p in range(len(prompts)):
            for s in range(sampling.samples):
                jobs.put((p, s))
        total = jobs.qsize()
        results: queue.SimpleQueue[Finished | EndpointError] = queue.SimpleQueue()
        stopped = threading.Event()

        def work() -> None:
            while not stopped.is_set():
                try:
                    p, s = jobs.get_nowait()
                except queue.Empty:
                    return
                outcome: Finished | EndpointError = EndpointError("a request failed in or1; see the traceback above")
                try:
                    outcome = Finished(p, s, self._respond(prompts[p], sampling, p, s))
                except EndpointError as error:
                    outcome = error
                finally:
                    results.put(outcome)

        try:
            # Not an executor: the interpreter joins its threads at exit, and a request may take an hour.
            for _ in range(min(self._config.concurrency, total)):
                threading.Thread(target=work, name="or1-endpoint", daemon=True).start()
            for _ in range(total):
                result = results.get()
                if isinstance(result, EndpointError):
                    raise result
                yield result
        finally:
            stopped.set()

    def update_weights(self, version: int) -> None:
        """Raise EndpointError: the server's weights are fixed."""
        raise EndpointError(f"{self._url} serves its own weights; train with rollout.engine, without [endpoint]")

    def close(self) -> None:
        """Do nothing: the engine has no processes."""

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
                **self._template,
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
            raise EndpointError(f"{self._url} sent an answer of unknown form: {json.dumps(answer)[:300]}") from error
        # JSON may contain half a surrogate pair, which cannot be written to a file.
        text = text.encode("utf-8", "replace").decode("utf-8")
        return Response(
            token_ids=np.full(tokens, -1, np.int32),
            logp=np.full(tokens, np.nan, np.float32),
            finish=finish,
            version=self.version,
            text=text,
        )

    def _only_model(self) -> str:
        listed = self._ask("/models", None)
        names = [each.get("id") for each in listed.get("data", []) if isinstance(each, Mapping)]
        if len(names) != 1:
            raise EndpointError(f"{self._url} has the models {names}; choose one with endpoint.model")
        return str(names[0])

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """Send one request, with retries after temporary failures, and return the JSON of the reply.

        Raises EndpointError.
        """
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
                if error.code not in _RETRIED:
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
            "raise endpoint.timeout_s or endpoint.retries. The same command resumes from here"
        )

    def _tell(self, text: str) -> None:
        """Print a line on stderr, at most one per second: concurrent requests fail together."""
        with self._tell_lock:
            now = time.monotonic()
            if now - self._last_told >= 1:
                self._last_told = now
                tell(f"or1: {text}")


class _SameOrigin(urllib.request.HTTPRedirectHandler):
    """A redirect handler that stays on one server: urllib would send the API key to any other server."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Return the redirected request. Raises EndpointError if scheme, host or port differ."""
        if _origin(req.full_url) != _origin(newurl):
            raise EndpointError(
                f"{req.full_url} redirects to {newurl}, another server, to which or1 does not send the API "
                "key; if that is the right server, set endpoint.url to its address"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _asked_pause(headers: email.message.Message) -> float | None:
    """Return the seconds of a Retry-After header, or None without one."""
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None
