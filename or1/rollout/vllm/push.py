"""Transport of weights from the trainer to a vLLM server: by file, or by broadcast to the server's workers."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from or1.core.errors import EngineError
from or1.core.files import replacing
from or1.dist.world import open_store
from or1.model.export import named_weights, weight_forms
from or1.rollout.vllm.memory_folder import MemoryFolder
from or1.rollout.vllm.weight_file import write_weights
from or1.rollout.vllm.worker import GROUP_TIMEOUT_S, address_towards, broadcast, make_group

Rpc = Callable[..., list[dict[str, Any]]]
"""rpc(method, **kwargs): call a method of every worker of the server; returns the workers' replies."""


class Push(Protocol):
    """A transport of weights to the workers of a server."""

    @property
    def folder(self) -> Path | None:
        """Folder of files that the server must be allowed to read; None if the transport uses no files."""
        ...

    def send(self, rpc: Rpc, model: PreTrainedModel, version: int) -> list[dict[str, Any]]:
        """Send the current weights; return the workers' replies. Collective if the model is sharded."""
        ...

    def repeat(self, rpc: Rpc, version: int) -> bool:
        """Send the weights of the last `send` again, to a restarted server; return False if they are not kept."""
        ...

    def close(self) -> None:
        """Delete files and close connections. Idempotent."""
        ...


class FilePush:
    """A transport by one safetensors file, which is kept until the next push for a restarted server.

    folder  where to write the file; None: a folder in memory
    needs   bytes of the file, for the choice of a place with room for it
    spare   a folder on a disk for want of room in memory
    """

    def __init__(self, folder: Path | None = None, *, needs: int = 0, spare: Path | None = None):
        self._own: MemoryFolder | None = None
        if folder is None:
            # In memory: the file is read once and need not survive a crash.
            self._own = MemoryFolder("or1-pushed-", needs, spare)
            folder = self._own.path
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self.path = folder / "weights.safetensors"

    def send(self, rpc: Rpc, model: PreTrainedModel, version: int) -> list[dict[str, Any]]:
        """Write the weights to the file, and let every worker read it, as `Push.send`."""
        if self._own is not None:
            # The old and the new weights together might not fit. From here on only the new ones can be sent again.
            self.path.unlink(missing_ok=True)
        with replacing(self.path, durable=False) as partial:
            write_weights(partial, model)
        return rpc("or1_load_file", path=str(self.path.resolve()), version=version)

    def repeat(self, rpc: Rpc, version: int) -> bool:
        """Let every worker read the file again, as `Push.repeat`."""
        if self.path.is_file():
            rpc("or1_load_file", path=str(self.path.resolve()), version=version)
        return self.path.is_file()

    def close(self) -> None:
        """Delete the folder if it is in memory."""
        if self._own:
            self._own.close()


class BroadcastPush:
    """A transport by broadcast in a process group of trainer and workers, which may be on another machine.

    url      http://host:port of the server
    workers  number of the server's workers
    backend  "nccl" or "gloo"
    """

    folder = None

    def __init__(self, url: str, workers: int, backend: str):
        host = urlsplit(url).hostname
        if host is None:
            raise EngineError(f"rollout.vllm.url = {url!r} names no host; write it as http://host:port")
        self._host, self._workers, self._backend = host, workers, backend
        self._group: Any = None
        self._store: dist.TCPStore | None = None
        self._caller = ThreadPoolExecutor(1, thread_name_prefix="or1-push")

    def send(self, rpc: Rpc, model: PreTrainedModel, version: int) -> list[dict[str, Any]]:
        """Broadcast the weights, as `Push.send`. After a failure, the next call makes a new process group."""
        group, self._group = self._group or self._join(rpc), None
        listed = [(name, str(dtype).removeprefix("torch."), list(shape)) for name, dtype, shape in weight_forms(model)]
        replies = self._caller.submit(rpc, "or1_receive", tensors=listed, version=version)
        broken: RuntimeError | None = None
        for _, tensor in named_weights(model):
            # After a failure no worker receives, but this rank must still take part in gathering every weight.
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
        """Return False: a broadcast keeps no weights."""
        return False

    def close(self) -> None:
        """Leave the process group and stop the thread."""
        self._group = self._store = None
        self._caller.shutdown(wait=False, cancel_futures=True)

    def _movable(self, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor if self._backend == "nccl" else tensor.cpu()).contiguous()

    def _join(self, rpc: Rpc) -> Any:
        rpc("or1_version")  # Fails at once if the server is dead; joining would wait for the timeout.
        address = address_towards(self._host)
        if self._store is None:
            self._store = open_store(address)
        session, size = secrets.token_hex(4), 1 + self._workers
        where = {"host": address, "port": self._store.port}
        joined = self._caller.submit(rpc, "or1_join", **where, session=session, size=size, backend=self._backend)
        group = make_group(self._store, session, 0, size, self._backend)
        joined.result(timeout=GROUP_TIMEOUT_S)
        return group
