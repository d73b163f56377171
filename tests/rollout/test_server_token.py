"""What a vLLM server of or1 does without the token, and how little it does with it. vLLM itself is left out."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from or1.rollout.vllm import worker as vllm_worker
from or1.rollout.vllm.client import http_client
from or1.rollout.vllm.process import may_take_proxy, server_environment, shared_folder
from or1.rollout.vllm.push import FilePush
from or1.rollout.vllm.setup import VllmSetup
from or1.rollout.vllm.streams import Failed, Streams
from or1.rollout.vllm.worker import RequireToken, WeightReceiver

TOKEN = (b"authorization", b"Bearer right")
SETUP = VllmSetup("model", "bfloat16", 8, 1, False, 1, 0.5, False, True, ())


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pushed").mkdir()
    monkeypatch.setenv(vllm_worker.TOKEN_VARIABLE, "right")
    monkeypatch.setenv("OR1_WEIGHTS_FOLDER", str(tmp_path / "pushed"))


def asked(scope: dict[str, Any], *parts: bytes) -> tuple[list[dict], bytes | None]:
    """Return a server's answer, and the body that the application behind the token received, or None."""
    sent: list[dict] = []
    reached: list[bytes] = []
    incoming = [{"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts)]

    async def receive() -> dict:
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    async def application(scope: dict, receive: Any, send: Any) -> None:
        reached.append(b"")
        while parts and (message := await receive())["type"] == "http.request":
            reached.append(message["body"])
        assert not parts or (await receive())["type"] == "http.disconnect"

    asyncio.run(RequireToken(application)(scope, receive, send))
    return sent, b"".join(reached) if reached else None


def http(path: str, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "path": path, "headers": list(headers)}


@pytest.mark.parametrize("headers", [[], [(b"authorization", b"Bearer wrong")], [(b"authorization", b"right")]])
def test_no_kind_of_connection_is_served_without_the_token(headers: list) -> None:
    sent, body = asked(http("/health", *headers))
    assert sent[0]["status"] == 401 and body is None
    sent, body = asked({"type": "websocket", "path": "/v1/realtime", "headers": headers})
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": "missing or wrong bearer token"}]
    assert body is None
    assert asked({"type": "webtransport", "headers": headers}) == ([], None), "what does not exist yet"
    assert asked({"type": "webtransport"}) == ([], None)


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_with_the_token_all_paths_are_served(kind: str) -> None:
    assert asked(http("/v1/completions", TOKEN) | {"type": kind}) == ([], b"")


def test_the_servers_own_start_and_end_need_no_token() -> None:
    assert asked({"type": "lifespan"}) == ([], b"")


def call(method: Any, **named: Any) -> bytes:
    return json.dumps({"method": method, "kwargs": named}).encode()


@pytest.mark.parametrize("parts", [1, 3])
def test_the_trainers_calls_reach_the_workers_whole(parts: int, tmp_path: Path) -> None:
    calls = [
        call("or1_version"),
        call("or1_join", host="h", port=1, session="s", size=2, backend="gloo"),
        call("or1_receive", tensors=[["w", "float32", [2, 3]]], version=1),
        call("or1_load_file", path=str(tmp_path / "pushed" / "weights.safetensors"), version=1),
    ]
    for body in calls:
        width = -(-len(body) // parts)
        pieces = [body[i : i + width] for i in range(0, len(body), width)]
        assert asked(http("/collective_rpc", TOKEN), *pieces) == ([], body)


@pytest.mark.parametrize(
    "body",
    [
        call("save_sharded_state", path="/x"),
        call("load_weights"),
        call("__init__"),
        call(None),
        call(["or1_version"]),
        b'{"method": "or1_version", "args": ["/etc"]}',
        b'{"method": "or1_load_file", "kwargs": "path"}',
        b"[]",
        b"",
        b"{",
        b"[" * 100_000,
        call("or1_load_file", version=1),
        call("or1_load_file", path=7, version=1),
        call("or1_load_file", path="a\0b", version=1),
    ],
)
@pytest.mark.parametrize("path", ["/collective_rpc", "/collective_rpc/", "/base/collective_rpc"])
def test_a_token_opens_no_other_method_of_a_worker(body: bytes, path: str) -> None:
    sent, reached = asked(http(path, TOKEN), body)
    assert reached is None and sent[0]["status"] == 403 and sent[1]["body"]


def test_a_call_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_worker, "_LONGEST_CALL", 1000)
    sent, reached = asked(http("/collective_rpc", TOKEN), *[b" " * 400] * 5)
    assert reached is None and sent[0]["status"] == 403 and b"at most 1000 bytes" in sent[1]["body"]


class Worker(WeightReceiver):
    """A worker whose model is a dictionary."""

    def __init__(self) -> None:
        self.model_runner, self.weights = self, {}

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.weights = dict(weights_iterator)


def test_a_worker_reads_files_of_one_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "pushed" / "weights.safetensors", tmp_path / "other.safetensors"
    for path in (inside, outside):
        save_file({"w": torch.ones(2)}, path)
    (tmp_path / "pushed" / "link.safetensors").symlink_to(outside)
    worker = Worker()
    assert worker.or1_load_file(str(inside), 3) == {"version": 3} and list(worker.weights) == ["w"]
    worker.weights = {}
    for path in (outside, tmp_path / "pushed" / ".." / outside.name, tmp_path / "pushed" / "link.safetensors"):
        with pytest.raises(ValueError, match=r"is not below .*pushed, .*--set run_dir"):
            worker.or1_load_file(str(path), 4)
        sent, reached = asked(http("/collective_rpc", TOKEN), call("or1_load_file", path=str(path), version=4))
        assert reached is None and sent[0]["status"] == 403 and b"--set run_dir" in sent[1]["body"]
    monkeypatch.setenv("OR1_WEIGHTS_FOLDER", "")
    with pytest.raises(ValueError, match="OR1_WEIGHTS_FOLDER is not set"):
        worker.or1_load_file(str(inside), 4)
    assert worker.weights == {} and worker.or1_version() == {"version": 3}


def test_a_server_is_told_the_folder_of_its_pushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push = FilePush(shared_folder(tmp_path / "run"))
    for weights in (push.folder, shared_folder(tmp_path / "run")):
        environment = server_environment(SETUP, "t", weights)
        monkeypatch.setenv("OR1_WEIGHTS_FOLDER", environment["OR1_WEIGHTS_FOLDER"])
        assert vllm_worker.refused_file(str(push.path.resolve())) is None
    own = FilePush()
    monkeypatch.setenv("OR1_WEIGHTS_FOLDER", server_environment(SETUP, "t", own.folder)["OR1_WEIGHTS_FOLDER"])
    assert vllm_worker.refused_file(str(own.path.resolve())) is None
    own.close()
    assert server_environment(SETUP, "t")["OR1_WEIGHTS_FOLDER"] == "", "none inherited"


def test_a_push_writes_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "thesis.tex"
    mine.write_text("mine")
    (tmp_path / "pushed" / ".weights.safetensors.partial").symlink_to(mine)
    weights = torch.ones(2)
    monkeypatch.setattr("or1.rollout.vllm.weight_file.named_weights", lambda _: [("w", weights)])
    monkeypatch.setattr("or1.rollout.vllm.weight_file.weight_forms", lambda _: [("w", weights.dtype, weights.shape)])
    push = FilePush(tmp_path / "pushed")
    push.send(lambda *_, **__: [], None, 1)
    assert mine.read_text() == "mine" and push.path.is_file() and not push.path.is_symlink()


def test_a_token_for_loopback_goes_to_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Proxy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(418)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy, ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        for each in (proxy, server):
            threading.Thread(target=each.serve_forever, args=(0.01,), daemon=True).start()
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_address[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with http_client(url, "right") as client:
            assert client.post(url + "/health").status_code == 418
        events: queue.SimpleQueue = queue.SimpleQueue()
        streams = Streams(url, "right", events.put)
        streams.send([(0, 0)], {})
        assert isinstance(events.get(timeout=10), Failed)
        streams.close()
        for each in (proxy, server):
            each.shutdown()
    assert [path for path, _ in seen] == ["/health", "/v1/completions"], "a proxy would be asked for a whole address"
    assert may_take_proxy("http://node:8000") and not may_take_proxy("http://[::1]:8000")
