"""The environment in a thread of its own: verifiers' event loop, and the endpoint that its episodes generate with.

Episodes run in the thread. What happens to them is returned by `next_event`, in the thread that owns the engine.
"""

from __future__ import annotations

import asyncio
import os
import queue
import secrets
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import verifiers.v1 as vf
from aiohttp import web

from or1.core.errors import EngineError

_KEY_VARIABLE = "OR1_ENVIRONMENT_API_KEY"
"""Holds the token of the endpoint. verifiers keeps variables named API_KEY from the programs of an environment."""
_MOST_BYTES = 1 << 30
_END_S = 5.0


@dataclass(frozen=True)
class Call:
    """A request for one completion.

    episode    number of the episode that asks
    token_ids  everything before the completion
    sampling   what the environment asks for, in vLLM's names
    """

    episode: int
    token_ids: list[int]
    sampling: Mapping[str, Any]
    _answer: asyncio.Future[dict[str, Any]] = field(repr=False, compare=False)

    def answer(self, token_ids: list[int], logp: list[float], finish: str) -> None:
        """Send the completion. Thread-safe."""
        content = [{"token": f"token_id:{t}", "logprob": p} for t, p in zip(token_ids, logp, strict=True)]
        choice = {"index": 0, "token_ids": token_ids, "logprobs": {"content": content}, "finish_reason": finish}
        self._settle({"request_id": secrets.token_hex(8), "choices": [choice]})

    def refuse(self, reason: str) -> None:
        """Send an error, which ends the episode. Thread-safe."""
        self._settle({"error": {"message": reason}})

    def _settle(self, reply: dict[str, Any]) -> None:
        def settle() -> None:
            if not self._answer.done():
                self._answer.set_result(reply)

        self._answer.get_loop().call_soon_threadsafe(settle)


@dataclass(frozen=True)
class Ended:
    """An episode that ended. `result` is None if the episode was cancelled, or text if verifiers raised an error."""

    episode: int
    result: vf.Episode | str | None


class Host:
    """One environment, ready to play. `play` starts an episode; `next_event` returns its calls and its end.

    env        the environment
    model      path of the model, whose tokenizer verifiers loads
    renderer   settings of the package renderers
    """

    def __init__(self, env: vf.Env, model: str, renderer: Mapping[str, Any]):
        self._events: queue.SimpleQueue[Call | Ended] = queue.SimpleQueue()
        self._env, self._model, self._renderer = env, model, dict(renderer)
        self._token = secrets.token_urlsafe(24)
        self._episodes: dict[str, int] = {}  # By the id of a trace, which is the id of a session in requests.
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="or1-environment", daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()
        try:
            self._on_loop(self._start()).result()
        except Exception as error:
            self.close()
            raise EngineError(f"the environment did not start: {type(error).__name__}: {error}") from error

    def play(self, episode: int, task: vf.Task, temperature: float) -> None:
        """Start an episode. Thread-safe."""

        def start() -> None:
            self._tasks[episode] = self._loop.create_task(self._play(episode, task, temperature))

        self._loop.call_soon_threadsafe(start)

    def next_event(self, timeout_s: float) -> Call | Ended | None:
        """Return the next event of any episode, None if there is none within `timeout_s`."""
        try:
            return self._events.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            return None

    def cancel(self, episode: int) -> None:
        """Cancel an episode, whose `Ended` follows unless the episode blocks the thread. Thread-safe."""

        def cancel() -> None:
            if task := self._tasks.get(episode):
                task.cancel()

        self._loop.call_soon_threadsafe(cancel)

    def close(self) -> None:
        """Cancel all episodes and stop the thread. Idempotent."""
        if not self._thread.is_alive():
            return
        try:
            self._on_loop(self._stop()).result(timeout=20)
        except (TimeoutError, RuntimeError):
            # An environment that blocks the thread. The thread is a daemon and ends with the process.
            return
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    def _on_loop(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _start(self) -> None:
        app = web.Application(client_max_size=_MOST_BYTES)
        app.router.add_post("/inference/v1/generate", self._generate)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        # verifiers itself connects to this port of this machine; nothing else does, and the token keeps others out.
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        os.environ[_KEY_VARIABLE] = self._token
        self._client = vf.TrainClientConfig(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key_var=_KEY_VARIABLE,
            renderer=self._renderer or None,
            renderer_model_name=self._model,
        )
        await self._stack.enter_async_context(self._env.serving())

    async def _stop(self) -> None:
        await self._end(list(self._tasks.values()))
        await self._stack.aclose()
        # What verifiers started on its own, such as loading a tokenizer ahead of need.
        await self._end([task for task in asyncio.all_tasks() if task is not asyncio.current_task()])

    async def _end(self, tasks: list[asyncio.Task[Any]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_END_S)

    async def _play(self, episode: int, task: vf.Task, temperature: float) -> None:
        mine: list[str] = []

        def minted(trace: vf.Trace) -> None:
            mine.append(trace.id)
            self._episodes[trace.id] = episode

        result: vf.Episode | str | None = None
        try:
            context = vf.ModelContext(
                model=self._model, client=self._client, sampling=vf.SamplingConfig(temperature=temperature)
            )
            result = await self._env.run_episode(task, context, on_trace=minted)
        except asyncio.CancelledError:
            result = None
        except Exception as error:  # noqa: BLE001 - an environment is a user's program and may raise anything
            result = f"{type(error).__name__}: {error}"
        finally:
            for name in mine:
                self._episodes.pop(name, None)
            self._tasks.pop(episode, None)
            self._events.put(Ended(episode, result))

    async def _generate(self, request: web.Request) -> web.Response:
        if not secrets.compare_digest(request.headers.get("Authorization", ""), f"Bearer {self._token}"):
            return web.json_response({"error": {"message": "wrong token"}}, status=401)
        episode = self._episodes.get(request.headers.get("X-Session-ID", ""))
        if episode is None:
            return web.json_response({"error": {"message": "the episode has ended"}}, status=400)
        body = await request.json()
        answer: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._events.put(Call(episode, body["token_ids"], body["sampling_params"], answer))
        reply = await answer
        return web.json_response(reply, status=400 if "error" in reply else 200)


def made(settings: Mapping[str, Any], harness: str) -> vf.Env:
    """Return the environment of `settings`, verifiers' EnvConfig, whose agents chat by `harness` on this machine.

    Raises EngineError for settings that verifiers refuses.
    """
    try:
        raw: dict[str, Any] = dict(settings)
        taskset = raw["taskset"]["id"]
        config = vf.env_config_type(taskset, raw.get("id", ""))
        chats = vf.default_harness_id(taskset) == "bash"
        for name, spec in ((n, f.default) for n, f in config.model_fields.items()):
            if not isinstance(spec, vf.AgentConfig):
                continue
            given = dict(raw.get(name) or {})
            # A sandbox of Prime Intellect is verifiers' default, and needs an account.
            given.setdefault("runtime", {"type": "subprocess"})
            pinned = given.get("harness") or (spec.harness and {"id": spec.harness.id})
            if (pinned is None and chats) or (pinned and pinned.get("id") == "null"):
                given["harness"] = {**(pinned or {}), "id": harness}
            raw[name] = given
        return vf.load_environment(vf.resolve_env_config(raw))
    except (ValueError, TypeError, ImportError, AttributeError, NotImplementedError) as error:
        raise EngineError(f"[environment]: verifiers cannot load it: {type(error).__name__}: {error}") from error
