"""Several servers, each answering over real HTTP at its own speed: who gets what, and what a death changes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from or1.core.errors import EngineError, ServerLost
from or1.dist.world import SINGLE
from or1.model.load import load_tokenizer
from or1.rollout.engine import INTERRUPTED, Finished, Sampling
from or1.rollout.vllm.client import Address, ServerClient
from or1.rollout.vllm.fleet import Fleet
from or1.rollout.vllm.setup import VllmSetup

from .conftest import prompts_of

TOKENS = 6


class Server(ThreadingHTTPServer):
    """A server of random tokens, a function of the seed of a request, with a delay before each.

    dies_after  the server closes every connection after this many requests
    """

    daemon_threads = True

    def __init__(self, delay_s: float, dies_after: int = 10**6):
        super().__init__(("127.0.0.1", 0), Handler)
        self.delay_s, self.dies_after, self.version, self.paused = delay_s, dies_after, 0, False
        self.requests: list[list[int]] = []
        self.open, self.most_open, self.lock = 0, 0, threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def dead(self) -> bool:
        return len(self.requests) > self.dies_after

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if self.path == "/collective_rpc":
            return self.answer({"results": [{"version": server.version}]})
        with server.lock:
            server.requests.append(body["prompt"])
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        try:
            self.stream(body)
        finally:
            with server.lock:
                server.open -= 1
        return None

    def stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        ids = np.random.default_rng(body["seed"]).integers(5, 19, TOKENS).tolist()
        for at, token in enumerate(ids):
            time.sleep(self.server.delay_s)
            if self.server.dead:
                self.connection.close()
                return
            finish = "abort" if self.server.paused else "stop" if at == TOKENS - 1 else None
            choice = {"index": 0, "token_ids": [token], "finish_reason": finish, "logprobs": {"token_logprobs": [-1.0]}}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            self.wfile.flush()
            if finish:
                return

    def answer(self, reply: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_: Any) -> None: ...

    def handle(self) -> None:
        # A dead server takes connections down while they are read and written.
        try:
            super().handle()
        except (OSError, ValueError):
            self.close_connection = True


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    """Return a slow server and one that is six times as fast."""
    made = [Server(0.03), Server(0.005)]
    yield made
    for server in made:
        server.shutdown()
        server.server_close()


def fleet_of(servers: list[Server], adder: Path, batch_size: int = 4) -> Fleet:
    setup = VllmSetup(str(adder), "float32", 64, batch_size, False, 1, 0.5, False, True, (1,))
    clients = [
        ServerClient(setup, None, load_tokenizer(str(adder)), Address(s.url, "secret", own=False)) for s in servers
    ]
    for client in clients:
        client.take_version(0)
    return Fleet(SINGLE, clients)


def generate(fleet: Fleet, prompts: int = 6, **settings: Any) -> list[Finished]:
    sampling = Sampling(**({"temperature": 1.0, "max_tokens": 24, "samples": 4, "seed": 5} | settings))
    return sorted(fleet.generate(prompts_of(prompts), sampling), key=lambda f: (f.prompt, f.sample))


def tokens(found: list[Finished]) -> list[list[int]]:
    return [f.response.token_ids.tolist() for f in found]


def test_a_fast_server_gets_more_and_the_responses_are_the_same(servers: list[Server], adder: Path) -> None:
    alone = generate(fleet_of(servers[1:], adder))
    servers[1].requests.clear()
    found = generate(fleet_of(servers, adder))
    assert tokens(found) == tokens(alone) and len(found) == 24
    assert {(f.prompt, f.sample) for f in found} == {(p, s) for p in range(6) for s in range(4)}
    slow, fast = (len(server.requests) for server in servers)
    # By how much depends on what else the machine does.
    assert slow + fast == 24 and slow >= 1 and fast > slow
    assert max(server.most_open for server in servers) <= 4


def test_the_responses_of_a_dead_server_come_from_another(
    servers: list[Server], adder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = generate(fleet_of(servers[1:], adder))
    servers[0].dies_after = 2
    fleet = fleet_of(servers, adder)
    found = generate(fleet)
    assert tokens(found) == tokens(alone)
    assert [server.url for server in fleet.live] == [servers[1].url] and fleet.metrics() == {"rollout/servers": 1.0}
    assert f"vLLM at {servers[0].url}" in (told := capsys.readouterr().err)
    assert "The other 1 of 2 servers go on" in told
    assert tokens(generate(fleet)) == tokens(alone), "the next rollout does not ask the dead one"


def test_the_last_server_to_die_ends_the_rollout_with_a_remedy(servers: list[Server], adder: Path) -> None:
    for server in servers:
        server.dies_after = 3
    fleet = fleet_of(servers, adder)
    with pytest.raises(ServerLost, match=r"[1-9]\d* responses were open\. Start it again, .*newest checkpoint"):
        generate(fleet)
    assert fleet.live == []
    with pytest.raises(ServerLost, match="no vLLM server is left"):
        generate(fleet)


def test_a_server_with_other_weights_is_left_out(servers: list[Server], adder: Path) -> None:
    fleet = fleet_of(servers, adder)
    servers[0].version = 3
    assert len(generate(fleet)) == 24 and servers[0].requests == []
    fleet = fleet_of(servers[1:], adder)
    fleet.servers[0]._complete = False
    with pytest.raises(EngineError, match="no complete set of weights"):
        generate(fleet)


def test_the_deadline_ends_what_is_open_and_what_nobody_has_begun(servers: list[Server], adder: Path) -> None:
    found = generate(fleet_of(servers[:1], adder), samples=8, deadline_s=0.2)
    assert len(found) == 48
    late = [f.response for f in found if f.response.finish == "deadline"]
    assert late and all(len(r.token_ids) < TOKENS and r.truncated for r in late)


def push(fleet: Fleet, servers: list[Server], version: int, absent: int | None = None) -> None:
    """Do to the fleet what a push does, except for the weights. absent: index of a server that the push misses."""
    with fleet.gate:
        for server in servers:
            server.paused = True
        fleet._end_requests()
        for i, (server, client) in enumerate(zip(servers, fleet.servers, strict=True)):
            server.paused, client.absent = False, i == absent
            if i != absent:
                server.version = version
                client.take_version(version)


@pytest.mark.parametrize("absent", [None, 0])
def test_a_push_in_the_middle_continues_every_response_with_the_new_version(
    servers: list[Server], adder: Path, absent: int | None
) -> None:
    for server in servers:
        server.delay_s = 0.02
    fleet = fleet_of(servers, adder)
    call = fleet.generate(prompts_of(12), Sampling(1.0, 24, 2, 5))
    found = [next(call)]
    while not all(any(each.tokens for each in line.waiting.values()) for s in fleet.servers for line in s.lines):
        found.append(next(call))
    push(fleet, servers, 1, absent)
    # The call learns of the push when it has read what came before.
    while not (began := call.unfinished()):
        found.append(next(call))
    found += call
    assert {f[:2] for f in found} == {(p, s) for p in range(12) for s in range(2)} and len(found) == 24
    for f in found:
        if f[:2] in began:
            old = began[f[:2]].token_ids.tolist()
            assert f.response.token_ids[: len(old)].tolist() == old and f.response.version == 1
            assert f.response.token_versions.tolist() == [0] * len(old) + [1] * TOKENS
    assert [server.url for server in fleet.live] == [server.url for i, server in enumerate(servers) if i != absent]
    assert all(not server.lines for server in fleet.servers)


def test_a_stop_ends_what_is_open_and_begins_nothing_more(servers: list[Server], adder: Path) -> None:
    began = time.monotonic()
    found = generate(fleet_of(servers[:1], adder), samples=8, stop=lambda: time.monotonic() > began + 0.1)
    cut = [f.response for f in found if f.response.finish == INTERRUPTED]
    assert len(found) < 48 and 1 <= len(cut) <= 4 and all(len(r.token_ids) < TOKENS for r in cut)
    assert len(servers[0].requests) <= len(found), "a request may be dropped before the server has read it"
