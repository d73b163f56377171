"""Extensions of a vLLM server: worker methods that receive weights, and a middleware that requires a token.

A client with the token may call the worker methods in `METHODS` and load weights from one folder, and nothing else.

vLLM imports both classes by name (`--worker-extension-cls`, `--middleware`) in the server's processes.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from or1.rollout.vllm.buckets import Form, divided, drain
from or1.rollout.vllm.mapped import PROBE, gpu_id, open_handle

TOKEN_VARIABLE = "OR1_SERVER_TOKEN"
WEIGHTS_VARIABLE = "OR1_WEIGHTS_FOLDER"
"""Environment variable with the folder below which a server may read weights."""
METHODS = frozenset({"or1_version", "or1_load_file", "or1_join", "or1_receive", "or1_place", "or1_map"})
"""Worker methods that /collective_rpc may call; vLLM itself would call any method of a worker."""
_LONGEST_CALL = 16 * 2**20  # bytes; a call lists every tensor of a model, about 100 KiB
GROUP_TIMEOUT_S = 120.0
"""Timeout of a push without progress."""


class _ModelRunner(Protocol):
    """The part of vLLM's model runner that is used here."""

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights of the model."""
        ...


class WeightReceiver:
    """A mixin for vLLM's worker, whose methods vLLM serves at /collective_rpc.

    The version is None while weights are loaded and after a failure; it is set once all weights are loaded.
    """

    # Attributes of vLLM's worker. Only declared: vLLM refuses an extension that redefines an attribute of its worker.
    rank: int
    device: torch.device
    model_runner: _ModelRunner

    _or1_version: int | None = None
    _or1_group: Any = None

    def or1_version(self) -> dict[str, int | None]:
        """Return the version of this worker's weights; None before the first push and after a failed one."""
        return {"version": self._or1_version}

    def or1_load_file(self, path: str, version: int) -> dict[str, int | None]:
        """Load weights from a safetensors file below OR1_WEIGHTS_FOLDER. Raises ValueError for any other file."""
        from safetensors import safe_open

        if refusal := refused_file(path):
            raise ValueError(refusal)
        with safe_open(path, framework="pt") as file:
            self._or1_take(((name, file.get_tensor(name)) for name in file.keys()), version)  # noqa: SIM118
        return self.or1_version()

    def or1_join(self, host: str, port: int, session: str, size: int, backend: str) -> dict[str, int | None]:
        """Join the trainer's process group, in which the trainer is rank 0."""
        self._or1_group = make_group((host, port), session, 1 + self.rank, size, backend)
        return self.or1_version()

    def or1_receive(self, tensors: list[Form], version: int, limit: int) -> dict[str, int | None]:
        """Receive weights that the trainer broadcasts in buckets of `limit` bytes; `tensors` lists them in order."""
        device = self.device if self._or1_group.name() == "nccl" else torch.device("cpu")
        buckets = divided(tensors, limit)
        space = torch.empty(max(bucket.size for bucket in buckets), dtype=torch.uint8, device=device)

        def receive(number: int) -> torch.Tensor:
            content = space[: buckets[number].size]
            broadcast(self._or1_group, content)
            return content

        self._or1_take(drain(tensors, buckets, receive, device), version)
        return self.or1_version()

    def or1_place(self, handle: dict[str, Any]) -> dict[str, Any]:
        """Return this worker's GPU, and in "refused" why it cannot map memory of the trainer; None if it can."""
        on_gpu, refused = self.device.type == "cuda", None
        try:
            if open_handle(handle).tolist() != [PROBE] * PROBE:
                refused = "the memory has other content here"
        except (RuntimeError, ValueError, OSError) as error:
            refused = f"{type(error).__name__}: {error}"
        return {"gpu": gpu_id(self.device.index) if on_gpu else None, "refused": refused}

    def or1_map(
        self, tensors: list[Form], version: int, limit: int, *, handle: dict[str, Any], port: int, session: str
    ) -> dict[str, int | None]:
        """Copy weights from buckets that the trainer fills in memory that this process maps.

        The trainer sets the key SESSION/K of its store when bucket K is filled; this worker sets SESSION/K/RANK when
        the bucket is copied.
        """
        buckets, buffer = divided(tensors, limit), open_handle(handle)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=GROUP_TIMEOUT_S))

        def copied(number: int) -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            store.set(f"{session}/{number}/{self.rank}", "copied")

        def receive(number: int) -> torch.Tensor:
            if number:
                copied(number - 1)
            store.wait([f"{session}/{number}"])
            return buffer[: buckets[number].size]

        def arriving() -> Iterator[tuple[str, torch.Tensor]]:
            yield from drain(tensors, buckets, receive, self.device)
            copied(len(buckets) - 1)

        self._or1_take(arriving(), version)
        return self.or1_version()

    def _or1_take(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        self._or1_version = None
        self.model_runner.reload_weights(weights_iterator=weights)
        self._or1_version = version


def make_group(address: tuple[str, int] | dist.TCPStore, session: str, rank: int, size: int, backend: str) -> Any:
    """Return a process group that is separate from torch's default group. Blocks until all `size` members have joined.

    address  host and port of the trainer's store, or the store itself
    session  name of the group, equal for all members
    backend  "nccl" or "gloo"
    """
    limit = timedelta(seconds=GROUP_TIMEOUT_S)
    store = address if isinstance(address, dist.TCPStore) else dist.TCPStore(*address, is_master=False, timeout=limit)
    prefixed = dist.PrefixStore(session, store)
    if backend == "nccl":
        # torch's stub lacks this overload.
        return dist.ProcessGroupNCCL(prefixed, rank, size, limit)  # type: ignore[arg-type]
    # By default gloo listens on the address of the host name, which may be on any network, or loopback by mistake.
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stub
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address_towards(store.host))]
    options._timeout = limit
    return dist.ProcessGroupGloo(prefixed, rank, size, options)


def address_towards(host: str) -> str:
    """Return this machine's address on the network towards `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # UDP: nothing is sent.
        return str(probe.getsockname()[0])


def broadcast(group: Any, tensor: torch.Tensor) -> None:
    """Broadcast rank 0's contiguous tensor, as bytes, so that the backend need not support its dtype. Collective."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor.reshape(-1).view(torch.uint8)], options).wait()


def refused_file(path: str) -> str | None:
    """Return the reason to refuse a file of weights; None if the file is below OR1_WEIGHTS_FOLDER."""
    folder = os.environ.get(WEIGHTS_VARIABLE)
    if not folder:
        return f"{path!r} is not loaded, since {WEIGHTS_VARIABLE} is not set here; start the server with `or1 serve`"
    # Both resolved: ".." and symbolic links may lead out of the folder.
    if Path(path).resolve().is_relative_to(Path(folder).resolve()):
        return None
    return (
        f"{path!r} is not below {folder}, the folder that this server reads weights from; start `or1 serve` with "
        "the same --set run_dir=... as `or1 train`, by the same path on both machines"
    )


def refused_call(body: bytes) -> str | None:
    """Return the reason to refuse a call of /collective_rpc; None if the trainer makes such calls."""
    try:
        call = json.loads(body)
        method, named = call["method"], call.get("kwargs") or {}
        if set(call) - {"method", "kwargs"} or not isinstance(named, dict):
            return "a call has a method and kwargs, and nothing else"
        if method not in METHODS:
            return f"{method!r} may not be called here; allowed methods: {', '.join(sorted(METHODS))}"
        return refused_file(named["path"]) if method == "or1_load_file" else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"the call cannot be read ({type(error).__name__}: {error})"


class RequireToken:
    """ASGI middleware that requires `Authorization: Bearer $OR1_SERVER_TOKEN` on every request and websocket.

    vLLM's own --api-key protects only /v1, not the paths that replace weights.
    """

    def __init__(self, app: Any):
        self._app = app
        self._expected = f"Bearer {os.environ[TOKEN_VARIABLE]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Forward a request, or answer 401 for a wrong token and 403 for a call that the trainer never makes."""
        kind = scope["type"]
        # "lifespan" is the server's own start and end. Every other kind of scope comes from outside.
        if kind != "lifespan" and not hmac.compare_digest(self._given(scope), self._expected):
            if kind == "http":
                await _answer(send, 401, "missing or wrong bearer token")
            elif kind == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": "missing or wrong bearer token"})
            return
        if kind == "http" and scope["path"].rstrip("/").endswith("/collective_rpc"):
            body = await _body(receive)
            if body is None:
                await _answer(send, 403, f"a call has at most {_LONGEST_CALL} bytes")
                return
            if (refusal := refused_call(body)) is not None:
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
    """Return the body of a request; None if the body is too long or the client has disconnected."""
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
    """Return a `receive` that first returns a body that has already been read, then later messages."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def first_the_body() -> Any:
        return waiting.pop() if waiting else await receive()

    return first_the_body
