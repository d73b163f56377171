"""Serialisation of rollout groups: safetensors for arrays, JSON for the rest, no pickle.

The bytes travel between ranks. Supported are trees of the dataclasses and enums of or1.core.types, tuples, lists,
dicts with string keys, numpy arrays and plain values. A new field of a dataclass needs no change here.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from or1.core import types
from or1.core.errors import WireError

_TREE = "tree"
# Only classes defined in or1.core.types may be named in a tree. Other attributes of that module are its imports.
_OWN = [each for each in vars(types).values() if isinstance(each, type) and each.__module__ == types.__name__]
_DATACLASSES = {each.__name__: each for each in _OWN if is_dataclass(each)}
_ENUMS = {each.__name__: each for each in _OWN if issubclass(each, StrEnum)}


def dumps(value: Any) -> bytes:
    """Return a tree as bytes. Raises TypeError for a value that `loads` could not rebuild."""
    arrays: dict[str, np.ndarray] = {}
    tree = json.dumps(_plain(value, arrays)).encode()
    return save(arrays | {_TREE: np.frombuffer(tree, dtype=np.uint8)})


def loads(data: bytes) -> Any:
    """Return the tree that `dumps` serialised, bit for bit except that lists become tuples.

    Raises WireError for bytes that `dumps` did not write.
    """
    try:
        arrays = load(data)
        return _rebuilt(json.loads(arrays.pop(_TREE).tobytes()), arrays)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, SafetensorError) as error:
        raise WireError(
            f"{len(data)} bytes from another rank cannot be decoded ({type(error).__name__}: {error}); run the same "
            "or1 on every rank"
        ) from error


def _plain(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        # Empty arrays too: safetensors keeps their shape and dtype.
        arrays[str(len(arrays))] = np.ascontiguousarray(value)
        return {"array": str(len(arrays) - 1)}
    if _DATACLASSES.get(type(value).__name__) is type(value):
        return {"type": type(value).__name__, **{f.name: _plain(getattr(value, f.name), arrays) for f in fields(value)}}
    if _ENUMS.get(type(value).__name__) is type(value):
        return {"enum": type(value).__name__, "value": value.value}
    if isinstance(value, tuple | list):
        return [_plain(item, arrays) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(item, arrays) for key, item in value.items()}}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{type(value).__name__} cannot be serialised; make it a dataclass of or1.core.types")


def _rebuilt(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(tree, list):
        return tuple(_rebuilt(item, arrays) for item in tree)
    if not isinstance(tree, dict):
        return tree
    match tree:
        case {"type": kind, **values}:
            return _DATACLASSES[kind](**{name: _rebuilt(value, arrays) for name, value in values.items()})
        case {"array": name, **none} if not none:
            return arrays[name]
        case {"dict": items, **none} if not none:
            return {key: _rebuilt(item, arrays) for key, item in items.items()}
        case {"enum": kind, "value": value, **none} if not none:
            return _ENUMS[kind](value)
    raise ValueError(f"an object with the keys {sorted(tree)}")
