"""What the ranks of test_pushing.py do: a shared engine, and a server of which only vLLM itself is left out."""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

from or1.config import DistConfig, ModelConfig, VllmConfig
from or1.core.errors import EngineError
from or1.core.types import Prompt
from or1.dist.world import World, join
from or1.model.export import named_weights
from or1.model.load import load_model
from or1.rollout.engine import Sampling
from or1.rollout.vllm import push as vllm_push
from or1.rollout.vllm import server as vllm_server
from or1.rollout.vllm import worker as vllm_worker
from or1.rollout.vllm.server import ServerEngine
from or1.rollout.vllm.setup import VllmSetup
from or1.rollout.vllm.shared import FollowingEngine, LeadingEngine
from or1.rollout.vllm.worker import WeightReceiver


class Worker(WeightReceiver):
    """A worker whose model is a dictionary."""

    rank, device = 0, torch.device("cpu")

    def __init__(self) -> None:
        self.model_runner, self.weights, self.refuses_after = self, {}, None

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.weights = {}
        for name, tensor in weights_iterator:
            if len(self.weights) == self.refuses_after:
                raise KeyError(name)
            self.weights[name] = tensor.clone()


class Loopback:
    """Stands where ServerProcess does: the same promises, with a `Worker` behind the address."""

    token = "none"

    def __init__(self, setup: VllmSetup, devices: str | None, log: Path, weights: Path | None):
        self.starts = 0
        # As in the server's own environment.
        os.environ[vllm_worker.WEIGHTS_VARIABLE] = str(weights)
        self._start()

    def restart(self) -> None:
        self.close()
        self._start()

    def _start(self) -> None:
        self.starts += 1
        self.worker = worker = Worker()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null")
                try:
                    reply, status = {"success": True}, 200
                    if body is not None:
                        reply = {"results": [getattr(worker, body["method"])(**body["kwargs"])]}
                except KeyError as error:
                    reply, status = {"refused": str(error)}, 500
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(reply).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def await_ready(self) -> None:
        pass

    def close(self) -> None:
        """Die: no longer listen, and break the connections of the group."""
        self.worker._or1_group = None
        self._http.shutdown()
        self._http.server_close()


def engine_of(world: World, path: Path, transport: str, run_path: Path) -> ServerEngine:
    vllm_server.ServerProcess = Loopback
    model = load_model(ModelConfig(path=str(path), dtype="bfloat16", device="cpu"), world)
    setup = VllmSetup(str(path), "bfloat16", 8, 1, False, 1, 0.5, False, True, ())
    if not world.is_main:
        return FollowingEngine(world, setup, model, None)
    return LeadingEngine(world, setup, VllmConfig(placement="server", transport=transport), model, None, run_path)


def disturb(engine: ServerEngine) -> dict[str, torch.Tensor]:
    """Change the weights; returns what a server must hold after the next push. Collective."""
    with torch.no_grad():
        for p in engine._model.parameters():
            p.add_(1)
    return dict(named_weights(engine._model))


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == others.keys() and all(
        t.dtype == others[name].dtype and t.equal(others[name]) for name, t in weights.items()
    )


def pushed_to_a_dead_server(path: Path, run_path: Path) -> dict[str, Any]:
    """Push to a dead server, then generate with a dead server."""
    with join(DistConfig(timeout_s=30), torch.device("cpu")) as world:
        engine = engine_of(world, path, "file", run_path)
        expected, before = disturb(engine), engine.url
        if world.is_main:
            engine.process.close()
        engine.update_weights(1)
        held = {reply["version"] for reply in engine._rpc("or1_version")}
        fresh = world.is_main and same(engine.process.worker.weights, expected)
        world.barrier()
        if world.is_main:
            engine.process.close()
        world.barrier()
        prompts = [Prompt("made", "made", "", np.array([5, 6, 7], np.int32), ("0",))]
        try:
            list(engine.generate(prompts, Sampling(1.0, 4, 3, 1)))
        except EngineError as error:
            told = str(error)
        starts = engine.process.starts if world.is_main else None
        return {"moved": engine.url != before, "held": held, "fresh": fresh, "told": told, "starts": starts}


def broadcast_to_a_failing_server(path: Path, run_path: Path) -> dict[str, Any]:
    """Push by broadcast: a good push, one that the worker refuses midway, a good one, one to a dead server."""
    # What a refusal leaves blocked on one rank must end before the other rank gives that one up.
    vllm_push.GROUP_TIMEOUT_S = vllm_worker.GROUP_TIMEOUT_S = 10
    alive: list[weakref.ref] = []
    most = 0

    def watched(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name, tensor in named_weights(model):
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield name, tensor

    vllm_push.named_weights = watched
    with join(DistConfig(timeout_s=60), torch.device("cpu")) as world:
        engine = engine_of(world, path, "broadcast", run_path)
        process, fresh, told = getattr(engine, "process", None), [], []
        for version, fault in enumerate(["none", "refused", "none", "dead"], start=1):
            expected = disturb(engine)
            if world.is_main:
                process.worker.refuses_after = 3 if fault == "refused" else None
                if fault == "dead":
                    process.close()
            try:
                engine.update_weights(version)
            except (EngineError, RuntimeError) as error:
                told.append(f"{type(error).__name__}: {error}")
                if fault == "refused":
                    # The other rank has gathered its weights and waits for the address.
                    world.gather(json.dumps(engine.address).encode())
            if fault == "none" and world.is_main:
                fresh.append(same(process.worker.weights, expected))
        return {"most": most, "sent": len(alive), "weights": len(expected), "fresh": fresh, "told": told}
