"""Tasks of an environment as prompts: the tokens of the first request of each task."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import verifiers.v1 as vf
from renderers import Renderer, create_renderer
from renderers.base import load_tokenizer
from verifiers.v1.clients.train import tool_to_wire
from verifiers.v1.dialects.chat import message_to_wire

from or1.config import Config
from or1.core.errors import DataError
from or1.core.types import Prompt
from or1.data.load import FileReport
from or1.data.problems import Problems
from or1.environment.host import Call, Ended, Host


def taskset_id(name: str) -> str:
    """Return the id of a taskset for verifiers. The folder of a file is added to the import path."""
    if not name.endswith(".py"):
        return name
    path = Path(name).resolve()
    if not path.is_file():
        raise DataError(f"environment.id = {name!r}: {path} does not exist")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    # Tool servers are processes that import the file by its name.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(path.parent) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(path.parent), *filter(None, paths)])
    return path.stem


def make_renderer(model: str, settings: Mapping[str, Any]) -> Renderer:
    """Return the renderer that verifiers will use for the model."""
    renderer = vf.TrainClientConfig(api_key_var="OR1_UNUSED", renderer=dict(settings) or None).renderer
    return create_renderer(load_tokenizer(model), renderer)


def tools_of(host: Host, task: vf.Task, timeout_s: float) -> list[vf.Tool]:
    """Play one episode in which the model says nothing, and return the tools of its first request.

    Raises DataError if the episode ends without a request, or takes longer than `timeout_s`.
    """
    host.play(-1, task, 1.0)
    answered = False
    while True:
        event = host.next_event(timeout_s)
        match event:
            case None:
                host.cancel(-1)
                raise DataError(f"the first task of the environment did not end within {timeout_s:g} s; see its hooks")
            case Call() if answered:
                event.refuse("or1 only asked for the tools")
            case Call():
                answered = True
                event.answer([], [], "length")
            case Ended(result=vf.Episode() as episode):
                traces = [trace for trace in episode.traces if trace.agent.trainable and trace.branches]
                if not traces:
                    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
                    cause = errors[0].message if errors else "it asked the model for nothing"
                    raise DataError(f"the first task of the environment cannot be played: {cause}")
                return list(traces[0].branches[0].tools)
            case Ended(result=reason):
                raise DataError(f"the first task of the environment cannot be played: {reason or 'it was cancelled'}")


def problems_of(config: Config, env: vf.Env, tools: Sequence[vf.Tool]) -> tuple[Problems, dict[str, vf.Task]]:
    """Return the tasks as prompts, and each task by the id of its prompt.

    Raises DataError for an endless taskset, a task without a prompt, or no task that fits data.max_prompt_tokens.
    """
    name, limit = config.environment.id, config.data.max_prompt_tokens
    if not env.taskset.bounded:
        raise DataError(f"environment.id = {name!r} has no last task; bound it, for example by its own settings")
    renderer = make_renderer(config.model.path, config.environment.renderer)
    wire = [tool_to_wire(tool) for tool in tools] or None
    prompts: list[Prompt] = []
    tasks: dict[str, vf.Task] = {}
    for i, task in enumerate(env.taskset):
        messages = list(_opening(task.data, f"{name}:{i}"))
        rendered = renderer.render(messages, tools=wire, add_generation_prompt=True)
        ids = np.array(rendered.token_ids, np.int32)
        tasks[f"{name}:{i}"] = task
        if len(ids) <= limit:
            text = task.data.prompt_text
            prompts.append(Prompt(f"{name}:{i}", name, text, ids, row=task.data.model_dump(mode="json")))
    if not prompts:
        raise DataError(
            f"environment.id = {name!r}: none of its {len(tasks)} tasks fits data.max_prompt_tokens = {limit}; raise it"
        )
    report = FileReport(name, "verifiers", len(tasks), len(prompts), len(tasks) - len(prompts), ())
    return Problems(prompts, (), {}, [report], [], [], []), tasks


def _opening(data: vf.TaskData, where: str) -> Iterator[dict[str, Any]]:
    """Yield the messages of the first request of a task."""
    if data.prompt is None:
        raise DataError(
            f"{where} has no prompt, because its user opens the conversation; or1 needs the prompt before the episode"
        )
    if data.system_prompt is not None:
        yield message_to_wire(vf.SystemMessage(content=data.system_prompt))
    messages = [vf.UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else data.prompt
    yield from (message_to_wire(message) for message in messages)
