"""Requests to a server with an OpenAI-compatible API: retries, the API key, and several requests at once."""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from or1.config import EndpointConfig
from or1.core.errors import EndpointError
from or1.core.terminal import tell

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses of temporary failures."""
_REFUSED = frozenset({400, 413, 422})
"""HTTP statuses of a request that the server does not take, while it takes others."""
_LONGEST_PAUSE_S = 60.0

J = TypeVar("J")
R = TypeVar("R")


class RequestRefused(EndpointError):
    """Request that the server refuses for what it asks, such as a prompt that is too long."""


class Reply(NamedTuple):
    """A text with the reasoning before it between <think> tags, why it ended, and the tokens that the server counts."""

    text: str
    finish: str
    prompt_tokens: int
    tokens: int


class ChatClient:
    """Client of one server.

    section  TOML section of the settings, for error messages
    """

    def __init__(self, config: EndpointConfig, section: str = "endpoint"):
        self._config, self._section = config, section
        self.url = (config.url or "").rstrip("/")
        local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        handlers = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_SameOrigin, *handlers)
        self._tell_lock, self._last_told = threading.Lock(), -math.inf
        self.model = config.model or self._only_model()

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Reply:
        """Return the reply to a chat. options: further keys of the request. Raises EndpointError, RequestRefused."""
        answer = self._ask("/chat/completions", {"model": self.model, "messages": list(messages), **options})
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
            reasoning = message.get("reasoning_content") or message.get("reasoning")
            if reasoning:
                closed = f"</think>{text}" if text else ""
                text = f"<think>{reasoning}{closed}"
            usage = answer.get("usage") or {}
            counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
            finish = "length" if choice.get("finish_reason") == "length" else "stop"
            # JSON may contain half a surrogate pair, which cannot be written to a file.
            return Reply(text.encode("utf-8", "replace").decode("utf-8"), finish, *counts)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise EndpointError(f"{self.url} sent an answer of unknown form: {json.dumps(answer)[:300]}") from error

    def _only_model(self) -> str:
        listed = self._ask("/models", None)
        names = [each.get("id") for each in listed.get("data", []) if isinstance(each, Mapping)]
        if len(names) != 1:
            raise EndpointError(f"{self.url} has the models {names}; choose one with {self._section}.model")
        return str(names[0])

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """Send one request, with retries after temporary failures, and return the JSON of the reply.

        Raises EndpointError.
        """
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        kind = EndpointError
        for attempt in range(self._config.retries + 1):
            try:
                with self._opener.open(request, timeout=self._config.timeout_s) as reply:
                    return json.load(reply)
            except EndpointError:
                raise
            except urllib.error.HTTPError as error:
                text = _text_of(error)
                # Some servers repeat the key that they refuse.
                cause = f"{error.code} {text.replace(key, '(key)') if key else text}"[:500]
                pause = _asked_pause(error.headers)
                if error.code not in _RETRIED:
                    kind = RequestRefused if error.code in _REFUSED else EndpointError
                    break
            except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
                cause, pause = f"{type(error).__name__}: {error}", None
            if attempt < self._config.retries:
                pause = min(pause if pause is not None else 2.0**attempt, _LONGEST_PAUSE_S)
                self._tell(
                    f"{self.url}{path}: {cause[:200]}; attempt {attempt + 2} of {self._config.retries + 1} in "
                    f"{pause:g} s"
                )
                time.sleep(pause)
        raise kind(
            f"{self.url}{path} failed after {attempt + 1} attempts: {cause}; look at the server, or "
            f"raise {self._section}.timeout_s or {self._section}.retries. The same command resumes from here"
        )

    def _key(self) -> str:
        """Return the API key, "" without one. Raises EndpointError for a key that a header cannot hold."""
        name = self._config.key_env
        key = os.environ.get(name, "").strip()
        # http.client would refuse the header, with the key in its message.
        if not (key.isascii() and key.isprintable()):
            raise EndpointError(
                f"the environment variable {name} holds a line break or another character that an API key cannot "
                f"have; set {name} to the key alone"
            )
        return key

    def _tell(self, text: str) -> None:
        """Print a line on stderr, at most one per second: concurrent requests fail together."""
        with self._tell_lock:
            now = time.monotonic()
            if now - self._last_told >= 1:
                self._last_told = now
                tell(f"or1: {text}")


def at_once(jobs: Sequence[J], work: Callable[[J], R], concurrency: int, patience_s: float = 0.0) -> Iterator[R]:
    """Yield the results of `work`, as they come, of at most `concurrency` jobs at once.

    Raises the EndpointError of the first job that fails. No job begins after that, nor after the caller stops.

    patience_s  seconds for which the error waits until the other jobs that have begun are done
    """
    waiting: queue.SimpleQueue[J] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    results: queue.SimpleQueue[tuple[R | None, EndpointError | None]] = queue.SimpleQueue()
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            result: R | None = None
            error: EndpointError | None = EndpointError("a request failed in or1; see the traceback above")
            try:
                result, error = work(job), None
            except EndpointError as found:
                error = found
            finally:
                results.put((result, error))

    try:
        # Not an executor: the interpreter joins its threads at exit, and a request may take an hour.
        for _ in range(min(concurrency, len(jobs))):
            threading.Thread(target=serve, name="or1-endpoint", daemon=True).start()
        for done in range(len(jobs)):
            result, error = results.get()
            if error is not None:
                stopped.set()
                deadline = time.monotonic() + patience_s
                with contextlib.suppress(queue.Empty):
                    while (done := done + 1) < len(jobs) - waiting.qsize():
                        results.get(timeout=max(deadline - time.monotonic(), 0.0))
                raise error
            yield result  # type: ignore[misc]  # R may be None
    finally:
        stopped.set()


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


def _text_of(error: urllib.error.HTTPError) -> str:
    """Return the beginning of the body of an error; its reason if the body does not arrive."""
    try:
        return error.read(8192).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _asked_pause(headers: email.message.Message) -> float | None:
    """Return the seconds of a Retry-After header, or None without one."""
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None
