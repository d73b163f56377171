"""User-defined reward functions, called with the arguments of TRL, verl, verifiers, OpenRLHF or AReaL.

The parameter names of a function decide its form. A function for batches gets batches of one, so its reward must not
depend on the other responses. All code here runs in the worker processes of `or1.reward.pool`.

  form       recognised by                arguments
  trl        completions                  prompts, completions, completion_ids and the row's columns as lists of one
  areal      prompt and completions       text, token ids and the row's columns
  verl       solution_str                 data_source, solution_str, ground_truth, extra_info
  verl_batch solution_strs                the same as lists of one
  openrlhf   queries                      queries (prompt and response), prompts, labels as lists of one
  verifiers  completion                   any of prompt, completion, answer, state, info, task, parser
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from or1.core.errors import RewardFunctionError
from or1.core.types import Score, Status

Job = Mapping[str, Any]

MAX_REWARD = 1e30
"""Largest size of a reward. Beyond it the deviation of a group would overflow, and training would silently stop."""


def begin(options: Mapping[str, Any]) -> dict[str, Any]:
    """Load the function options["path"] for `grade_job`. Return `needs_of` it. Raises RewardFunctionError."""
    _loaded[:] = [load(options["path"])]
    return needs_of(*_loaded[0])


def grade_job(job: Job) -> Score:
    """Call the loaded function on one response.

    Raises ValueError if the result is not a reward, and any exception of the function.
    """
    function, form = _loaded[0]
    arguments = _ARGUMENTS[form](job)
    result = function(**_accepted(function, arguments))
    if inspect.isawaitable(result):
        result = asyncio.run(_awaited(result))
    return _score(result, form)


def needs_of(function: Callable[..., Any], form: str) -> dict[str, Any]:
    """Return the name and form of a function, and the `columns` that its required parameters take from the data.

    Raises RewardFunctionError for a required parameter that the form never fills.
    """
    name = getattr(function, "__name__", str(function))
    required = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if unnamed := [p.name for p in required if p.kind is p.POSITIONAL_ONLY]:
        raise RewardFunctionError(
            f"{name}() takes {', '.join(unnamed)} by position only; remove the / from its "
            "parameters, which are given by name"
        )
    nothing = {
        "row": {},
        "source": "",
        "prompt": "",
        "prompt_ids": [],
        "golds": [],
        "completion": "",
        "completion_ids": [],
    }
    given = _ARGUMENTS[form](nothing)
    missing = [p.name for p in required if p.name not in given]
    # Columns that the form uses for its own arguments are no arguments themselves.
    never = [each for each in missing if form not in _WITH_COLUMNS or each not in _columns({"row": {each: None}})]
    if never:
        raise RewardFunctionError(
            f"{name}() needs {', '.join(map(repr, never))}, which its form ({form}) does not "
            f"give; it gives {', '.join(given)}. Give the parameter a default, or rename it"
        )
    return {"name": name, "form": form, "columns": missing}


def load(path: str) -> tuple[Callable[..., Any], str]:
    """Import "module:function" or "path/file.py:function" and return the function and its form.

    Raises RewardFunctionError, and any exception of the import.
    """
    place, _, name = path.rpartition(":")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_of_name(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardFunctionError(f"{place} has no function {name!r}; it has {_callables(module)}")
    return function, form_of(function)


def file_of(path: str) -> Path | None:
    """Return the file of the function `path` without importing a module, or None if there is no such file."""
    place = path.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place) if Path(place).is_file() else None
    origin, folders = None, None
    for part in place.split("."):
        spec = PathFinder.find_spec(part, folders)
        if spec is None:
            return None
        origin, folders = spec.origin, list(spec.submodule_search_locations or ())
    return Path(origin) if origin is not None and Path(origin).is_file() else None


def form_of(function: Callable[..., Any]) -> str:
    """Return the form of a function, one of those in the module's table. Raises RewardFunctionError."""
    names = set(inspect.signature(function).parameters)
    for form, needed in _SIGNS:
        if needed <= names:
            return form
    raise RewardFunctionError(
        f"the parameters of {getattr(function, '__name__', function)}({', '.join(sorted(names))}) are of no known "
        "form; name completions (TRL), prompt and completions (AReaL), solution_str (verl), solution_strs (verl in "
        "batches), queries (OpenRLHF) or completion (verifiers)"
    )


_loaded: list[tuple[Callable[..., Any], str]] = []
_WITH_COLUMNS = ("trl", "areal")
_BATCHES = ("trl", "verl_batch", "openrlhf")
_SIGNS = (
    ("areal", {"prompt", "completions"}),
    ("trl", {"completions"}),
    ("verl", {"solution_str"}),
    ("verl_batch", {"solution_strs"}),
    ("openrlhf", {"queries"}),
    ("verifiers", {"completion"}),
)


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise RewardFunctionError(f"no file {str(path)!r} (looked in {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(f"or1_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RewardFunctionError(f"{str(path)!r} cannot be imported as a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    return module


def _module_of_name(place: str) -> Any:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        # If the module exists but one of its own imports is missing, the user must see that error.
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise
        raise RewardFunctionError(
            f"no module {error.name!r}; install it, put its folder into PYTHONPATH, or name the "
            'file as "path/file.py:function"'
        ) from error


def _callables(module: Any) -> str:
    names = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
    return ", ".join(names) or "none"


def _accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are parameters of the function, or all of them if it has **kwargs."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


async def _awaited(result: Any) -> Any:
    return await result


# --- arguments


def _messages(job: Job) -> list[dict[str, str]] | None:
    prompt = job["row"].get("prompt")
    return prompt if isinstance(prompt, list) else None


def _reply(job: Job) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": job["completion"]}]


def _columns(job: Job) -> dict[str, Any]:
    """Return the row without the columns that the forms set themselves."""
    return {k: v for k, v in job["row"].items() if k not in ("prompt", "prompts", "completion", "completions")}


def _truth(job: Job) -> Any:
    """Return the gold answer as the data row holds it."""
    row = job["row"]
    model = row.get("reward_model")
    if isinstance(model, Mapping) and model.get("ground_truth") is not None:
        return model["ground_truth"]
    for name in ("ground_truth", "answer", "solution", "label"):
        if row.get(name) is not None:
            return row[name]
    return job["golds"][0] if len(job["golds"]) == 1 else job["golds"] or None


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing, as a replacement for TRL's logging callbacks."""


def _for_trl(job: Job) -> dict[str, Any]:
    messages = _messages(job)
    columns = {name: [value] for name, value in _columns(job).items()}
    return columns | {
        "prompts": [messages or job["prompt"]],
        "completions": [_reply(job) if messages else job["completion"]],
        "completion_ids": [job["completion_ids"]],
        "trainer_state": None,
        "log_extra": _nothing,
        "log_metric": _nothing,
    }


def _for_areal(job: Job) -> dict[str, Any]:
    named = {"prompt": job["prompt"], "completions": job["completion"]}
    return _columns(job) | named | {"prompt_ids": job["prompt_ids"], "completion_ids": job["completion_ids"]}


def _for_verl(job: Job) -> dict[str, Any]:
    row = job["row"]
    return {
        "data_source": row.get("data_source") or job["source"],
        "solution_str": job["completion"],
        "ground_truth": _truth(job),
        "extra_info": row.get("extra_info") or {},
    }


def _for_verl_batch(job: Job) -> dict[str, Any]:
    one = _for_verl(job)
    return {
        "data_sources": [one["data_source"]],
        "solution_strs": [one["solution_str"]],
        "ground_truths": [one["ground_truth"]],
        "extra_infos": [one["extra_info"]],
    }


def _for_openrlhf(job: Job) -> dict[str, Any]:
    return {"queries": [job["prompt"] + job["completion"]], "prompts": [job["prompt"]], "labels": [_truth(job)]}


def _for_verifiers(job: Job) -> dict[str, Any]:
    row = job["row"]
    prompt = _messages(job) or [{"role": "user", "content": job["prompt"]}]
    info = row.get("info") or {}
    named = {
        "prompt": prompt,
        "completion": _reply(job),
        "answer": row.get("answer") if row.get("answer") is not None else _truth(job),
        "info": json.loads(info) if isinstance(info, str) else info,
        "task": row.get("task") or "default",
    }
    return named | {"state": dict(named), "parser": _Parser()}


class _Parser:
    """The default parser of verifiers: the whole last message is the answer."""

    def parse(self, text: str) -> str:
        return text

    def parse_answer(self, completion: list[dict[str, str]] | str) -> str:
        return completion if isinstance(completion, str) else completion[-1]["content"]


_ARGUMENTS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "trl": _for_trl,
    "areal": _for_areal,
    "verl": _for_verl,
    "verl_batch": _for_verl_batch,
    "openrlhf": _for_openrlhf,
    "verifiers": _for_verifiers,
}


# --- results


def _score(result: Any, form: str) -> Score:
    reward = _reward(result, form in _BATCHES)
    if reward is None:
        return Score(math.nan, Status.SKIPPED)
    if not math.isfinite(reward):
        raise ValueError(f"the reward is {reward}; return a finite number, or None for none")
    if abs(reward) > MAX_REWARD:
        raise ValueError(f"the reward is {reward:g}, larger than {MAX_REWARD:g}; return a number of ordinary size")
    return Score(reward, Status.OK if reward > 0 else Status.WRONG)


def _reward(result: Any, batch: bool) -> float | None:
    """Return the number in the result of a function: the result itself, its "score" or "rewards", or its one element.

    batch  True: a tuple is a list of rewards. False: a tuple is verl's pair of a reward and its explanation
    """
    if isinstance(result, Mapping):
        key = next((k for k in ("score", "rewards", "reward", "scores") if k in result), None)
        if key is None:
            raise ValueError(f"the function returned {sorted(map(str, result))}; it must have 'score' or 'rewards'")
        return _reward(result[key], batch)
    if hasattr(result, "tolist"):
        result = result.tolist()
    if isinstance(result, list | tuple):
        if not result:
            raise ValueError("the function returned no reward for its one response")
        if len(result) > 1 and (batch or isinstance(result, list)):
            raise ValueError(f"the function returned {len(result)} rewards for 1 response; return one for each")
        return _reward(result[0], False)
    if result is None or isinstance(result, float):
        return result
    if isinstance(result, int) and abs(result) > MAX_REWARD:
        raise ValueError(
            f"the reward is a number of {result.bit_length()} bits, larger than {MAX_REWARD:g}; return a "
            "number of ordinary size"
        )
    if isinstance(result, bool | int):
        return float(result)
    raise ValueError(f"the function returned a {type(result).__name__}, not a number")
