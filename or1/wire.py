"""Groups as bytes, to travel between ranks and into checkpoints: safetensors for arrays, JSON for the rest, no pickle.

Any tree of or1.types' dataclasses, tuples, dicts, arrays and plain values; a new field needs no change here.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from or1 import types

_TREE = "tree"


def dumps(value: Any) -> bytes:
    """The bytes of a tree. Raises TypeError for anything that `loads` could not rebuild."""
    arrays: dict[str, np.ndarray] = {}
    tree = json.dumps(_plain(value, arrays)).encode()
    return save(arrays | {_TREE: np.frombuffer(tree, dtype=np.uint8)})


def loads(data: bytes) -> Any:
    """The inverse of `dumps`: bit for bit, lists as tuples."""
    arrays = load(data)
    return _rebuilt(json.loads(arrays[_TREE].tobytes()), arrays)


def _plain(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        # An empty array's bytes are nothing; safetensors keeps its shape and type all the same.
        arrays[str(len(arrays))] = np.ascontiguousarray(value)
        return {"array": str(len(arrays) - 1)}
    if is_dataclass(value) and getattr(types, type(value).__name__, None) is type(value):
        return {"type": type(value).__name__, **{f.name: _plain(getattr(value, f.name), arrays) for f in fields(value)}}
    if isinstance(value, StrEnum) and getattr(types, type(value).__name__, None) is type(value):
        return {"enum": type(value).__name__, "value": value.value}
    if isinstance(value, tuple | list):
        return [_plain(item, arrays) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(item, arrays) for key, item in value.items()}}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{type(value).__name__} cannot travel; make it a dataclass of or1.types")


def _rebuilt(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(tree, list):
        return tuple(_rebuilt(item, arrays) for item in tree)
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return arrays[tree["array"]]
    if "dict" in tree:
        return {key: _rebuilt(item, arrays) for key, item in tree["dict"].items()}
    if "enum" in tree:
        return getattr(types, tree["enum"])(tree["value"])
    return getattr(types, tree["type"])(**{k: _rebuilt(v, arrays) for k, v in tree.items() if k != "type"})
