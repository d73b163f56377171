"""Stores and groups listen where their members are and on no other interface, since they ask for no password."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from or1.dist import local_ranks
from or1.dist.world import open_store
from or1.rollout.vllm.push import BroadcastPush
from or1.rollout.vllm.worker import WeightReceiver
from tests.helpers.listeners import listeners

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

RANK = """#!{python}
import json, os, sys
import torch.distributed as dist
from tests.helpers.listeners import listeners
dist.init_process_group("gloo")
dist.barrier()
found = {{"rank": listeners([os.getpid()]), "launcher": listeners([os.getppid()])}}
open(os.path.join({out!r}, os.environ["RANK"]), "w").write(json.dumps(found))
dist.barrier()
"""


def test_the_helper_sees_a_socket_that_listens_everywhere() -> None:
    before = listeners([os.getpid()])
    with socket.create_server(("", 0)), socket.create_server(("127.0.0.1", 0)):
        assert sorted([*before, "0.0.0.0", "127.0.0.1"]) == listeners([os.getpid()])


def test_a_store_listens_on_its_own_address_alone() -> None:
    before = listeners([os.getpid()])
    store = open_store("127.0.0.1")
    store.set("key", "value")
    assert sorted([*before, "127.0.0.1"]) == listeners([os.getpid()])
    other = dist.TCPStore("127.0.0.1", store.port, is_master=False)
    assert other.get("key") == b"value"


@pytest.mark.timeout(60)
@pytest.mark.slow
def test_nproc_opens_no_port_beyond_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "rank"
    script.write_text(RANK.format(python=sys.executable, out=str(tmp_path)))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(local_ranks.sys, "executable", str(script))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    before = listeners([os.getpid()])
    assert local_ranks.run_ranks(2, []) == 0
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert set(found["rank"]) == {"127.0.0.1"}, "gloo"
        assert sorted([*before, "127.0.0.1"]) == found["launcher"], "the store"


def test_a_choice_of_interface_that_the_user_made_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert local_ranks._gloo_on_loopback() == {"GLOO_SOCKET_IFNAME": "eth7"}


@pytest.mark.timeout(60)
def test_a_broadcast_listens_on_the_announced_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # What `--nproc` tells its ranks must not reach a group that a server elsewhere joins; this name would fail.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none7")
    worker = type("Worker", (WeightReceiver,), {"rank": 0})()
    announced = []

    def rpc(method: str, **arguments: object) -> list[dict]:
        announced.append(arguments.get("host"))
        return [getattr(worker, method)(**arguments)]

    before = listeners([os.getpid()])
    push = BroadcastPush("http://127.0.0.1:1", workers=1, backend="gloo")
    group = push._join(rpc)
    found = listeners([os.getpid()])
    for address in before:
        found.remove(address)
    assert announced == [None, "127.0.0.1"] and set(found) == {"127.0.0.1"}
    assert group.size() == 2
    push.close()
