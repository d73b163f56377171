"""Transports of weights in buckets: a real worker in a process of its own, without vLLM and without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from or1.core.errors import EngineError
from or1.rollout.vllm import push as transports
from or1.rollout.vllm.buckets import divided, drain, fill, weight_bytes
from or1.rollout.vllm.mapped import handle_of, open_handle, shared_buffer
from or1.rollout.vllm.push import AutoPush, BroadcastPush, FilePush, MappedPush
from or1.rollout.vllm.worker import METHODS

# Types of all sizes, an empty weight, a scalar, a view that is not contiguous, and one larger than several buckets.
WEIGHTS = {
    "b": torch.arange(5, dtype=torch.uint8),
    "a": torch.randn(3, 7, dtype=torch.bfloat16),
    "d": torch.randn(2, 3, dtype=torch.float64).t(),
    "c": torch.randn(()),
    "empty": torch.randn(0, 4),
    "large": torch.randn(777, 3),
    "flag": torch.tensor([True, False, True]),
}
LIMIT = 2048


def forms_of(weights: dict[str, Tensor]) -> list[tuple[str, str, list[int]]]:
    return [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in weights.items()]


@pytest.mark.parametrize("limit", [256, 1000, LIMIT, 2**20])
def test_a_stream_of_buckets_carries_every_bit(limit: int) -> None:
    forms = forms_of(WEIGHTS)
    buckets = divided(forms, limit)
    assert all(0 < bucket.size <= limit for bucket in buckets)
    space = torch.empty(max(bucket.size for bucket in buckets), dtype=torch.uint8)
    # The same memory for every bucket, as in a push.
    contents = (content for content in fill(WEIGHTS.items(), buckets, space))
    found = list(drain(forms, buckets, lambda _: next(contents), torch.device("cpu")))
    assert [name for name, _ in found] == list(WEIGHTS)
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in found)


def test_few_buckets_carry_many_weights() -> None:
    forms = [(f"layer.{i}", "bfloat16", [1024, 1024]) for i in range(64)]
    buckets = divided(forms, 16 * 2**20)
    assert len(buckets) == 8
    assert sum(piece.size for bucket in buckets for piece in bucket.pieces) == 64 * weight_bytes("bfloat16", [1024**2])


def test_all_weights_are_taken_from_their_iterator_after_a_failure() -> None:
    taken: list[str] = []

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in WEIGHTS.items():
            taken.append(name)
            yield name, tensor

    buckets = divided(forms_of(WEIGHTS), LIMIT)
    for _ in fill(gathered(), buckets, torch.empty(LIMIT, dtype=torch.uint8)):
        pass
    assert taken == list(WEIGHTS)


WORKERS = """
import json, sys, torch
from concurrent.futures import ThreadPoolExecutor
from or1.rollout.vllm.worker import WeightReceiver

class Runner:
    def reload_weights(self, weights_iterator):
        self.held = {name: tensor for name, tensor in weights_iterator}

class Worker(WeightReceiver):
    device = torch.device("cpu")
    def __init__(self, rank):
        self.rank, self.model_runner = rank, Runner()
    def sums(self):
        return {n: round(t.double().sum().item(), 9) for n, t in self.model_runner.held.items()}

def reply(worker, call):
    try:
        return getattr(worker, call["method"])(**call["kwargs"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}

workers, pool = [Worker(rank) for rank in range(2)], ThreadPoolExecutor(2)
for line in sys.stdin:
    print(json.dumps(list(pool.map(reply, workers, [json.loads(line)] * 2))), flush=True)
"""


class Workers:
    """Two workers of a server in one process, and `rpc`, which talks to them in JSON as /collective_rpc does."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", WORKERS]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def rpc(self, method: str, **arguments: Any) -> list[dict[str, Any]]:
        assert method in {*METHODS, "sums"}
        self._process.stdin.write(json.dumps({"method": method, "kwargs": arguments}) + "\n")
        self._process.stdin.flush()
        replies = json.loads(self._process.stdout.readline())
        for reply in replies:
            if "error" in reply:
                raise EngineError(reply["error"])
        return replies

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    held = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    monkeypatch.setattr(transports, "named_weights", lambda _: iter(held.items()))
    monkeypatch.setattr(transports, "weight_forms", lambda _: [(n, t.dtype, t.shape) for n, t in held.items()])
    return held


class Model:
    device = torch.device("cpu")


def sums(weights: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(tensor.double().sum().item(), 9) for name, tensor in weights.items()}


@pytest.mark.parametrize("kind", ["mapped", "broadcast"])
def test_two_workers_hold_what_the_trainer_sent(kind: str, workers: Workers, weights: dict[str, Tensor]) -> None:
    url = "http://127.0.0.1:1"
    push = MappedPush(2, LIMIT, live=True) if kind == "mapped" else BroadcastPush(url, 2, "gloo", LIMIT, live=True)
    for version in (3, 4):
        weights["large"] += version
        assert [reply["version"] for reply in push.send(workers.rpc, Model(), version)] == [version, version]
        assert workers.rpc("sums") == [sums(weights)] * 2
    assert push.repeat(workers.rpc, 5)
    assert [reply["version"] for reply in workers.rpc("or1_version")] == [5, 5]
    push.close()


def test_no_memory_is_opened_but_what_torch_shares(workers: Workers, weights: dict[str, Tensor]) -> None:
    push = MappedPush(2, LIMIT)

    def forged(method: str, **arguments: Any) -> list[dict[str, Any]]:
        if method == "or1_map":
            arguments["handle"] |= {"name": "L2V0Yy9wYXNzd2Q="}  # "/etc/passwd"
        return workers.rpc(method, **arguments)

    with pytest.raises(EngineError, match="no memory that torch shares"):
        push.send(forged, Model(), 7)
    assert not push.repeat(workers.rpc, 7)
    assert push.send(workers.rpc, Model(), 8)[0]["version"] == 8
    push.close()


def test_automatic_choice_maps_what_can_be_mapped(workers: Workers, weights: dict[str, Tensor]) -> None:
    push = AutoPush("http://127.0.0.1:1", 2, None)
    push.send(workers.rpc, Model(), 9)
    assert isinstance(push._chosen, MappedPush)
    push.close()


@pytest.mark.parametrize(
    ("place", "chosen"),
    [
        ({"gpu": "here", "refused": None}, MappedPush),
        ({"gpu": "there", "refused": "GPU here is not visible"}, BroadcastPush),
        ({"gpu": "here", "refused": "cudaErrorInvalidValue"}, FilePush),
    ],
)
def test_automatic_choice_follows_what_the_workers_see(
    place: dict[str, Any], chosen: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(transports, "places_of", lambda rpc, device: [place])
    monkeypatch.setattr(transports, "gpu_id", lambda index: "here")
    push = AutoPush("http://127.0.0.1:1", 1, FilePush(tmp_path))
    assert type(push._choose(lambda *_: [], torch.device("cuda", 0))) is chosen
    if chosen is FilePush:
        with pytest.raises(EngineError, match=r"cudaErrorInvalidValue.*one GPU, and no folder has room"):
            AutoPush("http://127.0.0.1:1", 1, None)._choose(lambda *_: [], torch.device("cuda", 0))


def test_a_mapping_sees_what_the_other_side_writes() -> None:
    buffer = shared_buffer(64, torch.device("cpu"))
    other = open_handle(json.loads(json.dumps(handle_of(buffer))))
    buffer.fill_(7)
    assert other.tolist() == [7] * 64
