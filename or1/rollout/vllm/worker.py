"""What or1 adds to a vLLM server: workers that take weights from the trainer, and a token without which nobody may ask.

The token opens what the trainer needs and no more: of the workers' methods those in `METHODS`, and files of one folder.

vLLM loads both by their names (`--worker-extension-cls`, `--middleware`), in the server's processes.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TOKEN_VARIABLE = "OR1_SERVER_TOKEN"
WEIGHTS_VARIABLE = "OR1_WEIGHTS_FOLDER"
"""The folder below which a server takes files of weights."""
METHODS = frozenset({"or1_version", "or1_load_file", "or1_join", "or1_receive"})
"""What may be called at /collective_rpc, where vLLM itself would call any method of a worker by its name."""
_LONGEST_CALL = 16 * 2**20  # bytes; a call names every tensor of a model, which takes some 100 KiB
GROUP_TIMEOUT_S = 120.0
"""A push that makes no progress for this long has failed."""


class WeightReceiver:
    """Methods that vLLM mixes into its worker and serves at /collective_rpc.

    A version is set only once all of its weights are in place; while they are loaded, and if that fails, it is None.
    """

    _or1_version: int | None = None
    _or1_group: Any = None

    def or1_version(self) -> dict[str, int | None]:
        """Version of the weights that this worker holds; None before the first push and after one that failed."""
        return {"version": self._or1_version}

    def or1_load_file(self, path: str, version: int) -> dict[str, int | None]:
        """Take weights from a safetensors file below the folder of OR1_WEIGHTS_FOLDER. Raises ValueError."""
        from safetensors import safe_open

        if refusal := refused_file(path):
            raise ValueError(refusal)
        with safe_open(path, framework="pt") as file:
            self._or1_take(((name, file.get_tensor(name)) for name in file.keys()), version)  # noqa: SIM118
        return self.or1_version()

    def or1_join(self, host: str, port: int, session: str, size: int, backend: str) -> dict[str, int | None]:
        """Join the trainer's process group: it is rank 0, the workers follow."""
        self._or1_group = make_group((host, port), session, 1 + self.rank, size, backend)
        return self.or1_version()

    def or1_receive(self, tensors: list[tuple[str, str, list[int]]], version: int) -> dict[str, int | None]:
        """Take weights that the trainer broadcasts in this order: (name, dtype, shape) each."""
        device = self.device if self._or1_group.name() == "nccl" else torch.device("cpu")

        def arriving() -> Iterator[tuple[str, torch.Tensor]]:
            for name, dtype, shape in tensors:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
                broadcast(self._or1_group, tensor)
                yield name, tensor

        self._or1_take(arriving(), version)
        return self.or1_version()

    def _or1_take(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        self._or1_version = None
        self.model_runner.reload_weights(weights_iterator=weights)
        self._or1_version = version


def make_group(address: tuple[str, int] | dist.TCPStore, session: str, rank: int, size: int, backend: str) -> Any:
    """A process group beside torch's default one, which belongs to the trainer or to vLLM alone.

    address: where the trainer's store listens, or that store itself. Blocks until all `size` members are there.
    """
    limit = timedelta(seconds=GROUP_TIMEOUT_S)
    store = address if isinstance(address, dist.TCPStore) else dist.TCPStore(*address, is_master=False, timeout=limit)
    prefixed = dist.PrefixStore(session, store)
    if backend == "nccl":
        return dist.ProcessGroupNCCL(prefixed, rank, size, limit)
    # By itself gloo listens on the address of the host's name, which may be any network, or loopback by mistake.
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address_towards(store.host))]
    options._timeout = limit
    return dist.ProcessGroupGloo(prefixed, rank, size, options)


def address_towards(host: str) -> str:
    """Return this machine's address as `host` sees it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # UDP: nothing is sent.
        return probe.getsockname()[0]


def broadcast(group: Any, tensor: torch.Tensor) -> None:
    """Rank 0's contiguous tensor into everyone's, as bytes: a backend need not know its type."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor.reshape(-1).view(torch.uint8)], options).wait()


def refused_file(path: str) -> str | None:
    """Return why a file is not to be loaded; None if it lies below the folder of OR1_WEIGHTS_FOLDER."""
    folder = os.environ.get(WEIGHTS_VARIABLE)
    if not folder:
        return f"{path!r} is not loaded, since {WEIGHTS_VARIABLE} is not set here; start the server with `or1 serve`"
    # After resolving both: ".." and symbolic links lead out of a folder.
    if Path(path).resolve().is_relative_to(Path(folder).resolve()):
        return None
    return (
        f"{path!r} is not below {folder}, the folder that this server takes weights from; start `or1 serve` with "
        "--set run_dir=... as `or1 train` has it, by the same path on both machines"
    )


def refused_call(body: bytes) -> str | None:
    """Return why a call at /collective_rpc is refused, None if it is one that the trainer makes."""
    try:
        call = json.loads(body)
        method, named = call["method"], call.get("kwargs") or {}
        if set(call) - {"method", "kwargs"} or not isinstance(named, dict):
            return "a call has a method and kwargs, and nothing else"
        if method not in METHODS:
            return f"{method!r} is no method that may be called here; those are {', '.join(sorted(METHODS))}"
        return refused_file(named["path"]) if method == "or1_load_file" else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"the call cannot be read ({type(error).__name__}: {error})"


class RequireToken:
    """ASGI middleware: every request and websocket needs `Authorization: Bearer $OR1_SERVER_TOKEN`.

    vLLM's own --api-key guards /v1 alone, not the paths that replace weights.
    """

    def __init__(self, app: Any):
        self._app = app
        self._expected = f"Bearer {os.environ[TOKEN_VARIABLE]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass on, or answer 401, or 403 for a call that the trainer would not make."""
        kind = scope["type"]
        # "lifespan" is the server's own start and end. Whatever else there is or will be came from outside.
        if kind != "lifespan" and not hmac.compare_digest(self._given(scope), self._expected):
            if kind == "http":
                await _answer(send, 401, "missing or wrong bearer token")
            elif kind == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": "missing or wrong bearer token"})
            return
        if kind == "http" and scope["path"].rstrip("/").endswith("/collective_rpc"):
            body = await _body(receive)
            refusal = f"a call has at most {_LONGEST_CALL} bytes" if body is None else refused_call(body)
            if refusal is not None:
                await _answer(send, 403, refusal)
                return
            receive = _again(body, receive)
        await self._app(scope, receive, send)

    def _given(self, scope: dict[str, Any]) -> bytes:
        return dict(scope.get("headers") or ()).get(b"authorization", b"")


async def _answer(send: Any, status: int, text: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": text.encode("utf-8", "replace")})


async def _body(receive: Any) -> bytes | None:
    """Return the body of a request, None if it is too long or its sender has gone."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _LONGEST_CALL:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(body: bytes, receive: Any) -> Any:
    """Return a `receive` that gives a body which has been read already, then what comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def first_the_body() -> Any:
        return waiting.pop() if waiting else await receive()

    return first_the_body
