"""What or1 adds to a vLLM server: workers that take weights from the trainer, and a token without which nobody may ask.

vLLM loads both by their names (`--worker-extension-cls`, `--middleware`), in the server's processes.
"""

from __future__ import annotations

import hmac
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TOKEN_VARIABLE = "OR1_SERVER_TOKEN"
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
        """Take weights from a safetensors file that this machine can read."""
        from safetensors import safe_open

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


class RequireToken:
    """ASGI middleware: every request needs `Authorization: Bearer $OR1_SERVER_TOKEN`.

    vLLM's own --api-key guards /v1 alone, not the paths that replace weights.
    """

    def __init__(self, app: Any):
        self._app = app
        self._expected = f"Bearer {os.environ[TOKEN_VARIABLE]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass on, or answer 401."""
        if scope["type"] == "http" and not hmac.compare_digest(self._given(scope), self._expected):
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"missing or wrong bearer token"})
            return
        await self._app(scope, receive, send)

    def _given(self, scope: dict[str, Any]) -> bytes:
        return dict(scope["headers"]).get(b"authorization", b"")
