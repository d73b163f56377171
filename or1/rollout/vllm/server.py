"""vLLM as a process of its own, on this machine or another: the trainer's side of it."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from or1.config import VllmConfig
from or1.core.errors import EngineError, ServerLost
from or1.core.types import Prompt, Response
from or1.rollout.engine import Finished, Job, Sampling, Slot, continued, jobs_of
from or1.rollout.vllm.process import MODEL_NAME, ServerProcess, bearer, may_take_proxy, shared_folder
from or1.rollout.vllm.push import BroadcastPush, FilePush, Push
from or1.rollout.vllm.setup import VllmSetup
from or1.rollout.vllm.streams import Failed, Part, Streams
from or1.rollout.vllm.worker import TOKEN_VARIABLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WATCH_S = 2.0
"""How often a silent server is looked at; a dead one is noticed by then at the latest."""
STALL_S = 300.0
"""A server that lives but sends nothing for so long hangs. Prefilling the longest prompts takes seconds."""
DRAIN_S = 30.0
"""How long the blocks of aborted requests may stay held after a push."""
RPC_LIMIT_S = 600.0


@dataclass
class _Open:
    """A job on its way, and what it has so far."""

    job: Job
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)

    def response(self, finish: str, version: int) -> Response:
        added = (np.array(self.tokens, np.int32), np.array(self.logp, np.float32))
        return continued(self.job, *added, finish, version)


class ServerEngine:
    """A vLLM server as an `Engine`. One that or1 started and that dies is restarted once a call."""

    _alone = True
    """Whether no other rank generates with this server; one that is shared is not exchanged under the others."""

    def __init__(
        self,
        setup: VllmSetup,
        config: VllmConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        run_path: Path,
    ):
        self.version = 0
        self._setup, self._model, self._tokenizer = setup, model, tokenizer
        self.process: ServerProcess | None = None
        self._own = config.url is None
        self._push = _make_push(setup, config, run_path)
        if self._own:
            log = run_path / "vllm_server.log"
            self.process = ServerProcess(setup, config.devices, log, self._push.folder)
            self.process.start()
            self._token = self.process.token
        else:
            self._url, self._token = config.url, _token_of_another_server(config.url)
        self._http = http_client(self.url, self._token)
        self._whole = False
        if self.process is not None:
            self.process.await_ready()
        self.update_weights(0)

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self._url if self.process is None else self.process.url

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, begun: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """See `Engine.generate`. What a server had generated of a response when it died is generated anew."""
        waiting = {job.slot: _Open(job) for job in jobs_of(prompts, sampling, begun)}
        deadline = None if sampling.deadline_s is None else time.monotonic() + sampling.deadline_s
        restarted = False
        while waiting:
            try:
                self._require_version()
                yield from self._attempt(waiting, sampling, deadline)
            except ServerLost as lost:
                if restarted or not (self._own and self._alone):
                    remedy = "Run the same command" if self._own else "Start it again, then run the same command"
                    raise ServerLost(
                        f"{lost}; {len(waiting)} responses were open. {remedy}: training resumes from "
                        "the newest checkpoint"
                    ) from lost
                restarted = True
                self._restart()
                waiting = {slot: _Open(w.job) for slot, w in waiting.items()}

    def _attempt(self, waiting: dict[Slot, _Open], sampling: Sampling, deadline: float | None) -> Iterator[Finished]:
        """Yield what finishes and take it out of `waiting`. Raises ServerLost."""
        streams = Streams(self.url, self._token, self._bodies(list(waiting.values()), sampling))
        heard = time.monotonic()
        try:
            while waiting:
                left = WATCH_S if deadline is None else min(WATCH_S, deadline - time.monotonic())
                if left <= 0:
                    break
                try:
                    event = streams.events.get(timeout=left)
                except queue.Empty:
                    self._require_life(heard)
                    continue
                heard = time.monotonic()
                if isinstance(event, Failed):
                    raise (ServerLost if event.lost else EngineError)(f"vLLM at {self.url}: {event.cause}")
                if (done := self._take(waiting, event)) is not None:
                    yield self._finished(done, event.finish)
        finally:
            streams.close()
        for slot in list(waiting):
            yield self._finished(waiting.pop(slot), "deadline")

    def _take(self, waiting: dict[Slot, _Open], part: Part) -> _Open | None:
        """Add a part; the job if that was its last one."""
        open_ = waiting[part.slot]
        open_.tokens += part.token_ids
        open_.logp += part.logp
        return waiting.pop(part.slot) if part.finish is not None else None

    def _finished(self, open_: _Open, finish: str) -> Finished:
        response = open_.response(finish, self.version)
        text = self._tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True)
        return Finished(*open_.job.slot, Response(**vars(response) | {"text": text}))

    def _bodies(self, waiting: Sequence[_Open], sampling: Sampling) -> list[tuple[list[Slot], dict[str, Any]]]:
        """Requests: one for all new responses to a prompt, one for each that goes on."""
        together: dict[Any, list[Job]] = {}
        for job in (w.job for w in waiting):
            together.setdefault(job.slot if job.begun is not None else job.slot[0], []).append(job)
        return [
            (
                [job.slot for job in jobs],
                self._setup.sampling_options(jobs[0], sampling)
                | {
                    "model": MODEL_NAME,
                    "prompt": jobs[0].context_ids.tolist(),
                    "n": len(jobs),
                    "stream": True,
                    "return_token_ids": True,
                },
            )
            for jobs in together.values()
        ]

    def _require_life(self, heard: float) -> None:
        if self.process is not None and not self.process.alive():
            raise ServerLost("the vLLM server died")
        if time.monotonic() - heard > STALL_S:
            raise ServerLost(f"vLLM at {self.url} has sent nothing for {STALL_S:.0f} s")

    def _require_version(self) -> None:
        if not self._whole:
            raise EngineError(
                f"the vLLM server holds no whole set of weights (the push after version {self.version} "
                "failed); call update_weights again"
            )
        held = {reply["version"] for reply in self._rpc("or1_version")}
        if held != {self.version}:
            raise ServerLost(
                f"vLLM at {self.url} holds weights of version {held}, not {self.version}: it was "
                "restarted, or serves another run too"
            )

    def update_weights(self, version: int) -> None:
        """See `Engine.update_weights`. A server of or1's own that died since its last answer is started again, once."""
        self._whole = False
        try:
            replies = self._push.send(self._rpc, self._model, version)
        except ServerLost:
            if self.process is None:
                raise
            self._start_again()
            replies = self._send_again(version)
        self._commit(replies, version)

    def _send_again(self, version: int) -> list[dict[str, Any]]:
        """What a push that found the server dead brings to the fresh one; returns the workers' replies."""
        return self._push.send(self._rpc, self._model, version)

    def _commit(self, replies: list[dict[str, Any]], version: int) -> None:
        if {reply["version"] for reply in replies} != {version}:
            raise EngineError(f"vLLM's workers report {replies} after a push of version {version}")
        deadline = time.monotonic() + DRAIN_S
        # What the cache holds was computed with the old weights. Aborted requests hold blocks for a moment more.
        while not self._post("/reset_prefix_cache")["success"]:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"vLLM at {self.url} did not drop its prefix cache within {DRAIN_S:.0f} s: somebody "
                    "else's requests hold it; give the trainer a server of its own"
                )
            time.sleep(0.02)
        self.version, self._whole = version, True

    def release(self) -> None:
        """See `Engine.release`; the server's memory is its own."""

    def close(self) -> None:
        """End the server, if or1 started it."""
        if self.process is not None:
            self.process.close()
        self._push.close()
        self._http.close()

    def _restart(self) -> None:
        """A fresh server with the weights of the present version, as they were pushed."""
        self._start_again()
        self._commit(self._repeat(self.version), self.version)

    def _repeat(self, version: int) -> list[dict[str, Any]]:
        if not self._push.repeat(self._rpc, version):
            raise EngineError(
                "the restarted vLLM server cannot be given the weights again, since a broadcast keeps "
                'none; use rollout.vllm.transport = "file"'
            )
        return self._rpc("or1_version")

    def _start_again(self) -> None:
        self.process.close()
        self.process.start()
        self.process.await_ready()

    def _rpc(self, method: str, **arguments: Any) -> list[dict[str, Any]]:
        return self._post("/collective_rpc", {"method": method, "kwargs": arguments})["results"]

    def _post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            reply = self._http.post(self.url + path, json=body)
        except httpx.TransportError as error:
            raise ServerLost(f"vLLM at {self.url} does not answer ({type(error).__name__}: {error})") from error
        if reply.status_code != 200:
            raise EngineError(f"vLLM at {self.url} refused {path} ({reply.status_code}): {reply.text[:500]}")
        return reply.json()


def http_client(url: str, token: str) -> httpx.Client:
    """Return what asks a server for everything but completions, which are streamed."""
    # No connection is kept: the server closes it after an error, and the next request would find it dead.
    once = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(headers=bearer(token), timeout=RPC_LIMIT_S, limits=once, trust_env=may_take_proxy(url))


def _token_of_another_server(url: str) -> str:
    if TOKEN_VARIABLE not in os.environ:
        raise EngineError(
            f"rollout.vllm.url = {url!r}, but {TOKEN_VARIABLE} is not set; set it to the token that "
            "`or1 serve` was started with"
        )
    return os.environ[TOKEN_VARIABLE]


def _make_push(setup: VllmSetup, config: VllmConfig, run_path: Path) -> Push:
    own = config.url is None
    if config.transport == "file" or (own and config.transport == "auto"):
        return FilePush(None if own else shared_folder(run_path))
    url = "http://127.0.0.1" if own else config.url
    return BroadcastPush(url, setup.tensor_parallel, "nccl" if setup.on_gpu else "gloo")
