"""A vLLM server as a child process of or1: `python -m or1.rollout.vllm.process VLLM_ARGUMENTS`.

The server ends when the trainer ends, even by SIGKILL: it reads its standard input, which closes with the trainer.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from or1.core.allocator import users_environment
from or1.core.errors import EngineError
from or1.rollout.vllm.setup import STREAM_TOKENS, VllmSetup, vllm_environment
from or1.rollout.vllm.worker import TOKEN_VARIABLE, WEIGHTS_VARIABLE

START_LIMIT_S = 900.0
"""Longest start of a server; loading 32B weights from a cold disk takes minutes."""
MODEL_NAME = "policy"
"""Name of the model in requests."""


def server_arguments(setup: VllmSetup, host: str, port: int) -> list[str]:
    """Return command-line arguments of vLLM's OpenAI server for a server that `ServerEngine` can use."""
    options = setup.engine_options() | {
        "host": host,
        "port": port,
        "served_model_name": MODEL_NAME,
        "stream_interval": STREAM_TOKENS,
        "worker_extension_cls": "or1.rollout.vllm.worker.WeightReceiver",
        "middleware": "or1.rollout.vllm.worker.RequireToken",
        "uvicorn_log_level": "error",
    }
    return [part for name, value in options.items() for part in _argument(name.replace("_", "-"), value)]


def _argument(flag: str, value: Any) -> list[str]:
    """Return one engine argument as words of a command line."""
    if isinstance(value, bool):
        # vLLM has no --no-disable-log-stats.
        return [f"--{flag}"] if value else [] if flag == "disable-log-stats" else [f"--no-{flag}"]
    if isinstance(value, dict):
        return [f"--{flag}", json.dumps(value)]
    return [f"--{flag}", *map(str, value if isinstance(value, list | tuple) else [value])]


def shared_folder(run_path: Path) -> Path:
    """Return the folder of a run's pushed weights for a server on another machine, with transport = "file"."""
    return run_path / "pushed"


def server_environment(setup: VllmSetup, token: str, weights: Path | None = None) -> dict[str, str]:
    """Return the server's environment: the trainer's, without torchrun's variables, with those of the server.

    weights  folder below which the server may read weights; None: it may read none
    """
    # vLLM's own collectives share memory between processes, which growing segments do not allow.
    users = users_environment(os.environ)
    inherited = {k: v for k, v in users.items() if k not in _TORCHRUN and k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    # The development mode enables /collective_rpc and /reset_prefix_cache; `RequireToken` protects both.
    own = {"VLLM_SERVER_DEV_MODE": "1", TOKEN_VARIABLE: token, "PYTHONPATH": path}
    own[WEIGHTS_VARIABLE] = "" if weights is None else str(weights.absolute())
    return inherited | vllm_environment(setup.on_gpu) | own


_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class ServerProcess:
    """A server on loopback. The constructor starts the server and returns at once; `await_ready` waits for it.

    devices  CUDA_VISIBLE_DEVICES of the server; None: the trainer's
    log      file to which the server's output is appended
    weights  folder below which the server may read weights; None: it may read none
    """

    def __init__(self, setup: VllmSetup, devices: str | None, log: Path, weights: Path | None = None):
        self.token = secrets.token_hex(16)
        self._setup, self._devices, self._log, self._weights = setup, devices, log, weights
        self.url, self._process = self._start()

    def restart(self) -> None:
        """Kill the server if it still runs, and start it again, on another port."""
        self.close()
        self.url, self._process = self._start()

    def _start(self) -> tuple[str, subprocess.Popen[bytes]]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = server_environment(self._setup, self.token, self._weights)
        if self._devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices
        arguments = server_arguments(self._setup, "127.0.0.1", port)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "or1.rollout.vllm.process", *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return f"http://127.0.0.1:{port}", process

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the process group."""
        return self._process.pid

    def alive(self) -> bool:
        """Return True while the process runs."""
        return self._process.poll() is None

    def await_ready(self) -> None:
        """Wait until the server answers.

        Raises EngineError, with the end of the log, if the server exits or takes more than START_LIMIT_S.
        """
        import httpx

        deadline = time.monotonic() + START_LIMIT_S
        while self.alive() and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                reply = httpx.get(f"{self.url}/health", headers=bearer(self.token), timeout=5, trust_env=False)
                if reply.status_code == 200:
                    return
            time.sleep(0.2)
        fate = f"does not answer after {START_LIMIT_S:.0f} s" if self.alive() else "ended before it was ready"
        self.close()
        tail = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise EngineError(f"the vLLM server {fate}; the end of {self._log}:\n{tail}")

    def close(self) -> None:
        """Kill the server and its child processes. Idempotent."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def may_take_proxy(url: str) -> bool:
    """Return True if HTTP_PROXY and related variables apply: never for loopback, which a proxy cannot reach."""
    return urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1")


def bearer(token: str) -> dict[str, str]:
    """Return the HTTP header that `RequireToken` checks."""
    return {"Authorization": f"Bearer {token}"}


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run vLLM's server until standard input closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
