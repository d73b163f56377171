"""How a trainer's weights reach a vLLM server: through a file, or by broadcast into its workers."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import PreTrainedModel

from or1.core.files import replacing
from or1.dist.world import open_store
from or1.model.export import named_weights, weight_forms
from or1.rollout.vllm.memory_folder import MemoryFolder
from or1.rollout.vllm.worker import GROUP_TIMEOUT_S, address_towards, broadcast, make_group

Rpc = Callable[..., list[dict[str, Any]]]
"""rpc(method, **kwargs): run a method of every worker of the server; its replies."""


class Push(Protocol):
    """A way to bring weights to the workers."""

    folder: Path | None
    """Where the files of weights are that a server must be allowed to read; None if there are none."""

    def send(self, rpc: Rpc, model: PreTrainedModel, version: int) -> list[dict[str, Any]]:
        """Bring the present weights, in one call; returns the workers' replies."""
        ...

    def repeat(self, rpc: Rpc, version: int) -> bool:
        """Bring the last weights once more, to a server that was restarted; False if they are not kept."""
        ...

    def close(self) -> None:
        """Remove what was made."""
        ...


class FilePush:
    """One safetensors file that the server reads; the last one stays for a restarted server."""

    def __init__(self, folder: Path | None = None):
        # In memory: the file is read once and need not survive.
        self._own = MemoryFolder("or1-pushed-") if folder is None else None
        folder = self._own.path if self._own else folder
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self.path = folder / "weights.safetensors"

    def send(self, rpc: Rpc, model: PreTrainedModel, version: int) -> list[dict[str, Any]]:
        """See `Push.send`."""
        # clone: safetensors refuses tensors that share memory, as tied embeddings do.
        tensors = {name: t.to("cpu").contiguous().clone() for name, t in named_weights(model)}
        with replacing(self.path, durable=False) as partial:
            save_file(tensors, partial)
        return rpc("or1_load_file", path=str(self.path.resolve()), version=version)

    def repeat(self, rpc: Rpc, version: int) -> bool:
        """See `Push.repeat`."""
        if self.path.is_file():
            rpc("or1_load_file", path=str(self.path.resolve()), version=version)
        return self.path.is_file()

    def close(self) -> None:
        """See `Push.close`."""
        if self._own:
            self._own.close()


class BroadcastPush:
    """Trainer and workers in one process group; nothing is written, and the server may be on another machine."""

    folder = None

    def __init__(self, url: str, workers: int, backend: str):
        self._host, self._workers, self._backend = urlsplit(url).hostname, workers, backend
        self._group: Any = None
        self._store: dist.TCPStore | None = None
        self._caller = ThreadPoolExecutor(1, thread_name_prefix="or1-push")

    def send(self, rpc: Rpc, model: PreTrainedModel, version: int) -> list[dict[str, Any]]:
        """See `Push.send`. After a failure the group is made anew."""
        group, self._group = self._group or self._join(rpc), None
        listed = [(name, str(dtype).removeprefix("torch."), list(shape)) for name, dtype, shape in weight_forms(model)]
        replies = self._caller.submit(rpc, "or1_receive", tensors=listed, version=version)
        broken: RuntimeError | None = None
        for _, tensor in named_weights(model):
            # After a failure nobody receives any more, but the other ranks still gather every weight with this one.
            if broken is None and not replies.done():
                try:
                    broadcast(group, self._movable(tensor))
                except RuntimeError as error:
                    broken = error
        done = replies.result(timeout=GROUP_TIMEOUT_S)
        if broken is not None:
            raise broken
        self._group = group
        return done

    def repeat(self, rpc: Rpc, version: int) -> bool:
        """See `Push.repeat`; a broadcast keeps nothing."""
        return False

    def close(self) -> None:
        """See `Push.close`."""
        self._group = self._store = None
        self._caller.shutdown(wait=False, cancel_futures=True)

    def _movable(self, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor if self._backend == "nccl" else tensor.cpu()).contiguous()

    def _join(self, rpc: Rpc) -> Any:
        rpc("or1_version")  # Nobody would come to a group with a dead server.
        address = address_towards(self._host)
        if self._store is None:
            self._store = open_store(address)
        session, size = secrets.token_hex(4), 1 + self._workers
        where = {"host": address, "port": self._store.port}
        joined = self._caller.submit(rpc, "or1_join", **where, session=session, size=size, backend=self._backend)
        group = make_group(self._store, session, 0, size, self._backend)
        joined.result(timeout=GROUP_TIMEOUT_S)
        return group
