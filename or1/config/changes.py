"""Rules about which settings may change when a run is resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from or1.config import Config
from or1.config.section import section_of

# The tuned choice of a run is in its folder, so `tune` may change. The rest are settings of logging and evaluation, of
# the engine's process, of the division of work, and of memory and the graders' resources.
_FREE = (
    "tune",
    "log",
    "checkpoint",
    "eval",
    "judge",
    "dist",
    "model.gradient_checkpointing",
    "model.lora.push",
    "rollout.vllm",
    "rollout.verify_every",
    "reward.workers",
    "reward.memory_mib",
)
# Fields that only set how long a stage lasts. Replay relies on all other fields of a stage being unchanged.
_LENGTH = frozenset({"steps", "until", "plateau_evals", "plateau_gain"})
_ABSENT = object()
# Fields that only future evaluations are compared with. They have no effect on a stage that has ended.
_NO_MORE = frozenset({"plateau_evals", "plateau_gain"})
_STAGE = re.compile(r"stage\.(\d+)(?:\.([\w.]+))?")


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the dotted paths of the leaves that differ between two resolved configs; a table in a list by its index.

    A setting that the old config lacks, because an older or1 did not have it, counts as its default.
    """
    return [key for key in _differences(old, new, "") if not _is_new_and_default(key.split("."), old, new)]


def described(keys: Sequence[str], old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line for each key with its old and new value, such as "optim.lr: 0.001 -> 0.01"."""
    return [f"{key}: {_text(_value(old, key))} -> {_text(_value(new, key))}" for key in keys]


def _value(settings: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(settings, dict):
            settings = settings.get(part, _ABSENT)
        elif isinstance(settings, list | tuple) and part.isdecimal() and int(part) < len(settings):
            settings = settings[int(part)]
        else:
            return _ABSENT
    return settings


def _text(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def fixed_keys(changed: Sequence[str], done: int, begun: int, stages: int) -> list[str]:
    """Return those of the changed keys that a run with trained steps must not change.

    done    number of stages that have ended
    begun   number of stages that have had a step
    stages  number of stages in the new config; the last one may be extended after its end
    """

    def is_free(key: str) -> bool:
        if found := _STAGE.fullmatch(key):
            index, name = int(found[1]), found[2]
            return index >= begun or name in _NO_MORE or (name in _LENGTH and (index >= done or index == stages - 1))
        return any(f"{key}.".startswith(f"{free}.") for free in _FREE)

    return [key for key in changed if not is_free(key)]


def is_default(path: Sequence[str], value: Any) -> bool:
    """Return True if a value of a resolved config is the default of the setting at `path`.

    path  keys and indices, such as ("stage", "0", "reuse"). A required setting, and one that this or1 does not have,
          has no default.
    """
    section: Any = Config
    for name in path[:-1]:
        if not name.isdecimal():
            field = getattr(section, "model_fields", {}).get(name)
            section = section_of(field.annotation)[0] if field is not None else None
    field = getattr(section, "model_fields", {}).get(path[-1])
    return field is not None and not field.is_required() and _dumped_default(field) == value


def _dumped_default(field: FieldInfo) -> Any:
    """Return the default of a field as in a resolved config in JSON, which has lists where a section has tuples."""
    default = field.get_default(call_default_factory=True)
    value = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
    return list(value) if isinstance(value, tuple) else value


def _differences(old: Any, new: Any, prefix: str) -> Iterator[str]:
    if _has_tables(old) or _has_tables(new):
        old, new = (dict(enumerate(each or ())) for each in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{prefix}{name}.")
    elif old != new:
        yield prefix.rstrip(".")


def _is_new_and_default(path: Sequence[str], old: Any, new: Any) -> bool:
    section: Any = Config
    for name in path:
        if isinstance(old, list | tuple) and isinstance(new, list | tuple) and name.isdecimal():
            if int(name) >= min(len(old), len(new)):
                return False
            old, new = old[int(name)], new[int(name)]
            continue
        field = getattr(section, "model_fields", {}).get(name)
        if field is None or not isinstance(old, dict) or not isinstance(new, dict) or name not in new:
            return False
        if name not in old:
            value = _dumped_default(field)
            return value is not None and new[name] == value
        section, old, new = section_of(field.annotation)[0], old[name], new[name]
    return False


def _has_tables(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(each, dict) for each in value)
