"""Transport of weights from the trainer to a vLLM server: by mapped memory, by broadcast, or by a file."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from or1.config import VllmConfig
from or1.core.errors import EngineError
from or1.core.files import replacing
from or1.dist.world import open_store
from or1.model.export import named_weights, weight_forms
from or1.rollout.vllm.buckets import BUCKET, divided, fill
from or1.rollout.vllm.mapped import PROBE, gpu_id, handle_of, shared_buffer
from or1.rollout.vllm.memory_folder import MemoryFolder
from or1.rollout.vllm.process import shared_folder
from or1.rollout.vllm.setup import VllmSetup
from or1.rollout.vllm.weight_file import file_bytes, write_weights
from or1.rollout.vllm.worker import GROUP_TIMEOUT_S, address_towards, broadcast, make_group

_LOOK = timedelta(seconds=1)
"""How often a trainer that waits for a worker looks whether the call has failed."""

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


class StreamedPush:
    """A transport of the weights as a stream of buckets, with one call of the server for all of them.

    workers  number of the server's workers
    limit    most bytes of a bucket
    live     True if the model keeps the weights of a push until all responses to them are complete, so that they can
             be sent again
    """

    folder = None

    def __init__(self, workers: int, limit: int = BUCKET, live: bool = False):
        self._workers, self._limit, self._live = workers, limit, live
        self._sent: PreTrainedModel | None = None
        self._caller = ThreadPoolExecutor(1, thread_name_prefix="or1-push")

    def send(self, rpc: Rpc, model: PreTrainedModel, version: int) -> list[dict[str, Any]]:
        """Send the weights bucket by bucket, as `Push.send`."""
        self._sent = None
        forms = [(name, str(dtype).removeprefix("torch."), list(shape)) for name, dtype, shape in weight_forms(model)]
        buckets = divided(forms, self._limit)
        space = self._space(max((bucket.size for bucket in buckets), default=0), model.device)
        replies = self._begin(rpc, space, tensors=forms, version=version, limit=self._limit)
        broken: RuntimeError | None = None
        for number, content in enumerate(fill(named_weights(model), buckets, space)):
            # After a failure no worker receives, but this rank must still take part in gathering every weight.
            if broken is None and not replies.done():
                try:
                    self._deliver(number, content, replies)
                except RuntimeError as error:
                    broken = error
        done = replies.result(timeout=GROUP_TIMEOUT_S)
        if broken is not None:
            raise broken
        self._end()
        self._sent = model
        return done

    def repeat(self, rpc: Rpc, version: int) -> bool:
        """Send the model's weights again, if they are still those of the last push; as `Push.repeat`."""
        if not self._live or self._sent is None:
            return False
        self._forget()
        self.send(rpc, self._sent, version)
        return True

    def close(self) -> None:
        """Close connections and stop the thread."""
        self._forget()
        self._caller.shutdown(wait=False, cancel_futures=True)

    def _space(self, size: int, device: torch.device) -> torch.Tensor:
        """Return memory for one bucket, u8[size]."""
        raise NotImplementedError

    def _begin(self, rpc: Rpc, space: torch.Tensor, **call: Any) -> Future[list[dict[str, Any]]]:
        """Connect to the workers, and start the call that receives all buckets; return its replies to come."""
        raise NotImplementedError

    def _deliver(self, number: int, content: torch.Tensor, replies: Future[Any]) -> None:
        """Send one bucket; its memory may change after the return. Raises RuntimeError."""
        raise NotImplementedError

    def _end(self) -> None:
        """Note that a push is complete."""

    def _forget(self) -> None:
        """Drop connections to a server that may be gone."""


class BroadcastPush(StreamedPush):
    """A transport by broadcast in a process group of trainer and workers, which may be on another machine.

    url      http://host:port of the server
    backend  "nccl" or "gloo"
    """

    def __init__(self, url: str, workers: int, backend: str, limit: int = BUCKET, live: bool = False):
        super().__init__(workers, limit, live)
        host = urlsplit(url).hostname
        if host is None:
            raise EngineError(f"rollout.vllm.url = {url!r} names no host; write it as http://host:port")
        self._host, self._backend = host, backend
        self._group: Any = None
        # The group of the push that is under way: after a failure, the next push makes a new one.
        self._used: Any = None
        self._store: dist.TCPStore | None = None

    def _space(self, size: int, device: torch.device) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device if self._backend == "nccl" else "cpu")

    def _begin(self, rpc: Rpc, space: torch.Tensor, **call: Any) -> Future[list[dict[str, Any]]]:
        self._used, self._group = self._group or self._join(rpc), None
        return self._caller.submit(rpc, "or1_receive", **call)

    def _deliver(self, number: int, content: torch.Tensor, replies: Future[Any]) -> None:
        broadcast(self._used, content)

    def _end(self) -> None:
        self._group = self._used

    def _forget(self) -> None:
        self._group = self._used = None

    def close(self) -> None:
        """Leave the process group and stop the thread."""
        super().close()
        self._store = None

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


class MappedPush(StreamedPush):
    """A transport through memory that the trainer and the workers map: a GPU's by CUDA's IPC, or the host's.

    The trainer fills a bucket, and fills it again when every worker has copied it.
    """

    def __init__(self, workers: int, limit: int = BUCKET, live: bool = False):
        super().__init__(workers, limit, live)
        self._store: dist.TCPStore | None = None
        self._session = ""

    def _space(self, size: int, device: torch.device) -> torch.Tensor:
        return shared_buffer(size, device)

    def _begin(self, rpc: Rpc, space: torch.Tensor, **call: Any) -> Future[list[dict[str, Any]]]:
        if self._store is None:
            self._store = open_store("127.0.0.1")
        self._session = secrets.token_hex(4)
        where = {"port": self._store.port, "session": self._session, "handle": handle_of(space)}
        return self._caller.submit(rpc, "or1_map", **where, **call)

    def _deliver(self, number: int, content: torch.Tensor, replies: Future[Any]) -> None:
        assert self._store is not None
        if content.is_cuda:
            torch.cuda.synchronize(content.device)
        self._store.set(f"{self._session}/{number}", "filled")
        copied = [f"{self._session}/{number}/{rank}" for rank in range(self._workers)]
        deadline = time.monotonic() + GROUP_TIMEOUT_S
        while not replies.done():
            with contextlib.suppress(dist.DistStoreError):
                self._store.wait(copied, _LOOK)
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"a worker of the server did not copy a bucket within {GROUP_TIMEOUT_S:.0f} s")

    def _end(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()

    def close(self) -> None:
        """Stop the thread, and close the store."""
        super().close()
        self._store = None


class AutoPush:
    """The first transport that works to a server on GPUs: mapped memory, NCCL, a file. Chosen at the first push.

    url    http://host:port of the server
    file   what is left if the processes share no GPU and NCCL cannot connect them; None: nothing is left
    """

    def __init__(self, url: str, workers: int, file: FilePush | None, live: bool = False):
        self._url, self._workers, self._file, self._live = url, workers, file, live
        self._chosen: Push | None = None

    @property
    def folder(self) -> Path | None:
        """Folder of the file, as `Push.folder`."""
        return None if self._file is None else self._file.folder

    def send(self, rpc: Rpc, model: PreTrainedModel, version: int) -> list[dict[str, Any]]:
        """Send the weights, as `Push.send`."""
        if self._chosen is None:
            self._chosen = self._choose(rpc, model.device)
        return self._chosen.send(rpc, model, version)

    def repeat(self, rpc: Rpc, version: int) -> bool:
        """Send the weights again, as `Push.repeat`."""
        return self._chosen is not None and self._chosen.repeat(rpc, version)

    def close(self) -> None:
        """Close the chosen transport."""
        for push in (self._chosen, self._file):
            if push is not None:
                push.close()

    def _choose(self, rpc: Rpc, device: torch.device) -> Push:
        places = places_of(rpc, device)
        if all(place["refused"] is None for place in places):
            return MappedPush(self._workers, live=self._live)
        # NCCL refuses two members of a group on one GPU.
        if device.type != "cuda" or gpu_id(_index(device)) not in {place["gpu"] for place in places}:
            return BroadcastPush(self._url, self._workers, "nccl" if device.type == "cuda" else "gloo", live=self._live)
        if self._file is None:
            refused = next(place["refused"] for place in places if place["refused"] is not None)
            raise EngineError(
                f"no transport of weights to {self._url} works: the server cannot map this process's memory "
                f"({refused}), NCCL refuses two processes on one GPU, and no folder has room for a file"
            )
        return self._file


def places_of(rpc: Rpc, device: torch.device) -> list[dict[str, Any]]:
    """Return for each worker its GPU, and why it cannot map memory of this process; None if it can."""
    probe = shared_buffer(PROBE, device)
    probe.fill_(PROBE)
    if probe.is_cuda:
        torch.cuda.synchronize(probe.device)
    return rpc("or1_place", handle=handle_of(probe))


def make_push(setup: VllmSetup, config: VllmConfig, model: PreTrainedModel, run_path: Path) -> Push:
    """Return the transport of `rollout.vllm.transport`."""
    own = config.url is None
    url = "http://127.0.0.1" if config.url is None else config.url[0]
    alone = not (dist.is_initialized() and dist.get_world_size() > 1)
    workers, live = setup.tensor_parallel, alone and not setup.ahead
    automatic = config.transport == "auto"
    if config.transport == "ipc":
        return MappedPush(workers, live=live)
    if automatic and setup.on_gpu:
        return AutoPush(url, workers, _file_if_room(own, model, run_path), live)
    if config.transport == "file" or (own and automatic):
        return _file(own, model, run_path)
    return BroadcastPush(url, workers, "nccl" if setup.on_gpu else "gloo", live=live)


def _file(own: bool, model: PreTrainedModel, run_path: Path) -> FilePush:
    folder = shared_folder(run_path)
    return FilePush(needs=file_bytes(model), spare=folder) if own else FilePush(folder)


def _file_if_room(own: bool, model: PreTrainedModel, run_path: Path) -> FilePush | None:
    try:
        return _file(own, model, run_path)
    except EngineError:
        return None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
