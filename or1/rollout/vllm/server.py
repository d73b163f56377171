"""vLLM as a separate process, on this machine or another: its start, its weights and its restart."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from or1.config import VllmConfig
from or1.core.errors import EngineError, ServerLost
from or1.rollout.vllm.client import Address, ServerClient
from or1.rollout.vllm.process import ServerProcess
from or1.rollout.vllm.push import FilePush, make_push
from or1.rollout.vllm.setup import VllmSetup
from or1.rollout.vllm.worker import TOKEN_VARIABLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DRAIN_S = 30.0
"""Longest time that aborted requests may hold cache blocks after a push."""


class ServerEngine(ServerClient):
    """A vLLM server as an `Engine`. A server that or1 started is restarted at most once per call if it dies.

    process   the server's process; None if another program started the server (`rollout.vllm.url`)
    clients   number of ranks that use the server
    push_now  push the weights at once; False for one of several servers
    """

    process: ServerProcess | None

    def __init__(
        self,
        setup: VllmSetup,
        config: VllmConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        run_path: Path,
        *,
        clients: int = 1,
        push_now: bool = True,
    ):
        self._push = make_push(setup, config, model, run_path)
        if config.url is None:
            self.process = ServerProcess(setup, config.devices, run_path / "vllm_server.log", self._push.folder)
            address = Address(self.process.url, self.process.token, own=True)
        else:
            self.process = None
            address = Address(config.url[0], token_of_another_server(config.url[0]), own=False)
        super().__init__(setup, model, tokenizer, address, clients=clients)
        self._paused = False  # True from a pause until the push after it has succeeded.
        if self.process is not None:
            self.process.await_ready()
        if push_now:
            self.update_weights(0)

    @property
    def pushes_file(self) -> bool:
        """True if a push writes a file, which several servers can read."""
        return isinstance(self._push, FilePush)

    def push(self, version: int, *, again: bool) -> None:
        """Push the weights without a restart of the server. again: send the file that was written last."""
        self.drop_version()
        self._commit(self._repeat(version) if again else self._send_again(version), version)
        self._resume()

    def update_weights(self, version: int) -> None:
        """Push the weights, as `Engine.update_weights`; restart the server once if or1 started it and it died."""
        with self.gate:
            if self._is_generating():
                self.pause()
                self._await_ranks()
                self.end_requests()
                self._await_ranks()
            self.drop_version()
            try:
                replies = self._push.send(self._rpc, self._model, version)
            except ServerLost:
                if self.process is None:
                    raise
                self._start_again(self.process)
                replies = self._send_again(version)
            self._commit(replies, version)
            self._resume()

    def pause(self) -> None:
        """Let the server abort its requests and report their tokens; later ones wait until the next push.

        Not vLLM's mode "keep", which continues with the cache of the old weights: a part of a stream could then hold
        tokens of two versions, and the completions API of vLLM 0.32 does not tell them apart.
        """
        self._paused = True
        # Of a dead server nothing is left to abort; the push notices that.
        with contextlib.suppress(ServerLost):
            self._post("/pause?mode=abort")

    def close(self) -> None:
        """Stop the server if or1 started it, and delete pushed weights."""
        self._closed = True  # First, so that no call restarts the server.
        if self.process is not None:
            self.process.close()
        self._push.close()
        super().close()

    def _recover(self, starts: int) -> bool:
        with self.gate:
            if self.process is None or self._closed:
                return False
            # A push or another call may have restarted the server, while this call waited for the gate.
            if self.starts == starts:
                self._restart()
        return True

    def _is_alive(self) -> bool:
        return self.process is None or self.process.alive()

    def _resume(self) -> None:
        if self._paused:
            self._post("/resume")
            self._paused = False

    def _is_generating(self) -> bool:
        """Return True if requests of any rank are open."""
        return bool(self.lines)

    def _await_ranks(self) -> None:
        """Wait for the other ranks that use the server."""

    def _send_again(self, version: int) -> list[dict[str, Any]]:
        """Repeat a failed push to the restarted server; return the workers' replies."""
        return self._push.send(self._rpc, self._model, version)

    def _commit(self, replies: list[dict[str, Any]], version: int) -> None:
        """Check that every worker has `version`, and drop the prefix cache, which holds results of old weights."""
        if {reply["version"] for reply in replies} != {version}:
            raise EngineError(f"vLLM's workers report {replies} after a push of version {version}")
        deadline = time.monotonic() + DRAIN_S
        # Aborted requests hold cache blocks for a moment longer, and the reset fails until then.
        while not self._post("/reset_prefix_cache")["success"]:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"vLLM at {self.url} did not drop its prefix cache within {DRAIN_S:.0f} s: requests of "
                    "another client use it; give this run a server that nothing else uses"
                )
            time.sleep(0.02)
        self.take_version(version)

    def _restart(self) -> None:
        """Restart the server, and load the weights of the last push."""
        if self.process is None:
            raise ServerLost(f"vLLM at {self.url} was started by another program, so or1 cannot restart it")
        self._start_again(self.process)
        self._commit(self._repeat(self.version), self.version)

    def _repeat(self, version: int) -> list[dict[str, Any]]:
        if not self._push.repeat(self._rpc, version):
            raise EngineError(
                "the weights cannot be sent again to the restarted vLLM server: this transport keeps no copy, and the "
                'trainer may have changed its own; use rollout.vllm.transport = "file"'
            )
        return self._rpc("or1_version")

    def _start_again(self, process: ServerProcess) -> None:
        process.restart()
        self.starts += 1
        self.address = Address(process.url, process.token, own=True)
        process.await_ready()


def token_of_another_server(url: str) -> str:
    """Return the token of a server that or1 did not start. Raises EngineError if there is none."""
    if TOKEN_VARIABLE not in os.environ:
        raise EngineError(
            f"rollout.vllm.url = {url!r}, but {TOKEN_VARIABLE} is not set; set it to the token that "
            "`or1 serve` was started with"
        )
    return os.environ[TOKEN_VARIABLE]
