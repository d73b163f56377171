"""A key is for the server that it was meant for: no redirect and no proxy takes it elsewhere."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError

import pytest
from pydantic import ValidationError

from or1.config import EndpointConfig, VllmConfig
from or1.core.errors import EndpointError
from or1.rollout.chat_client import ChatClient
from or1.rollout.endpoint import EndpointEngine

KEY = "sk-secret"


@contextmanager
def server(answer: Callable[[str], tuple[int, dict[str, str], Any]]) -> Iterator[tuple[str, list]]:
    """Start a server that gives `answer(path)`; yield its address and the (path, key) of each request."""
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            status, headers, body = answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", seen
        running.shutdown()


MODELS = (200, {}, {"data": [{"id": "m"}]})


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_never_follows_a_redirect_to_another_server(status: int) -> None:
    with (
        server(lambda _: MODELS) as (other, given),
        server(lambda path: (status, {"Location": f"{other}{path}"}, b"")) as (url, asked),
        pytest.raises(EndpointError, match=rf"redirects to {other}/models, another server.*set endpoint.url"),
    ):
        EndpointEngine(EndpointConfig(url=url, retries=3))
    assert given == [] and asked == [("/models", f"Bearer {KEY}")], "asked once, since no retry would change it"


@pytest.mark.parametrize("change", ["host", "scheme"])
def test_another_name_or_scheme_is_another_server(change: str) -> None:
    def answer(path: str) -> tuple[int, dict[str, str], Any]:
        return 302, {"Location": elsewhere + path}, b""

    with server(answer) as (url, _):
        elsewhere = url.replace("127.0.0.1", "localhost") if change == "host" else url.replace("http:", "https:")
        with pytest.raises(EndpointError, match="another server"):
            EndpointEngine(EndpointConfig(url=url, retries=0))


def test_a_redirect_within_the_server_is_followed() -> None:
    def answer(path: str) -> tuple[int, dict[str, str], Any]:
        return MODELS if path == "/v2/models" else (302, {"Location": "/v2/models"}, b"")

    with server(answer) as (url, seen):
        assert EndpointEngine(EndpointConfig(url=url)).model == "m"
    assert seen == [("/models", f"Bearer {KEY}"), ("/v2/models", f"Bearer {KEY}")]


def test_an_error_whose_body_does_not_arrive_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise TimeoutError("timed out")

    def refuse(self: Any, request: Any, timeout: float) -> Any:
        tries.append(timeout)
        raise HTTPError(request.full_url, 503, "Busy", Message(), Silent())

    tries: list[float] = []
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("urllib.request.OpenerDirector.open", refuse)
    with pytest.raises(EndpointError, match="failed after 2 attempts: 503 Busy"):
        ChatClient(EndpointConfig(url="http://127.0.0.1:1", model="m", retries=1, timeout_s=3)).chat([])
    assert tries == [3, 3]


def test_no_message_shows_the_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    echo = f"{'x' * 495}{KEY} is not a key".encode()
    with server(lambda path: (401 if path == "/models" else 503, {}, echo)) as (url, seen):
        with pytest.raises(EndpointError, match=r"401 xxx") as refused:
            EndpointEngine(EndpointConfig(url=url))
        client = ChatClient(EndpointConfig(url=url, model="m", retries=1))
        with pytest.raises(EndpointError, match=r"503 xxx") as failed:
            client.chat([])
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\n")
        with pytest.raises(EndpointError, match="401"):
            EndpointEngine(EndpointConfig(url=url))
        assert {key for _, key in seen} == {f"Bearer {KEY}"}, "a line break at the end is not of the key"
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
        with pytest.raises(EndpointError, match="OPENAI_API_KEY holds a line break") as broken:
            EndpointEngine(EndpointConfig(url=url))
    shown = f"{refused.value}{failed.value}{broken.value}{capsys.readouterr()}"
    assert "attempt 2 of 2" in shown and KEY[:5] not in shown


@pytest.mark.parametrize("body", [b"[" * 100_000, b"9" * 5000])
def test_an_answer_that_no_parser_reads_is_an_error_with_a_remedy(body: bytes) -> None:
    with server(lambda _: (200, {}, body)) as (url, _), pytest.raises(EndpointError, match="look at the server"):
        EndpointEngine(EndpointConfig(url=url, retries=0))


@pytest.mark.parametrize("url", ["http://node:8000", "https://node:8000", "https://node"])
def test_a_vllm_server_may_stand_behind_tls(url: str) -> None:
    assert VllmConfig(placement="server", url=url).url == (url,)


@pytest.mark.parametrize("url", ["ftp://node", "https://node/v1", "node:8000", "https://no de", "http://node:8000\n"])
def test_other_addresses_of_a_vllm_server_are_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="url"):
        VllmConfig(placement="server", url=url)
