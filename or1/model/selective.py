"""Checkpointed layers that keep the outputs of attention, so that backward runs the rest of a layer again.

Attention over long rows costs more than the rest of a layer, and its output is small: [T, Q, D] and one number a head
and token. With the outputs kept, attention runs once forward and once backward, and the gradient is the same.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint


def selective_checkpoint(function: Callable, *args: object) -> object:
    """Return `function(*args)`. Save its inputs and the outputs of its attention, and recompute the rest in backward.

    A kernel that torch's dispatcher does not see, and attention made of plain operations, are recomputed too.
    """
    return checkpoint(function, *args, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    kept: _Outputs = defaultdict(list)
    return _Keeping(kept), _Replaying(kept)


_Outputs = defaultdict[Any, list[Any]]


@functools.cache
def is_attention(op: Any) -> bool:
    """Return True for the forward operator of an attention kernel: torch's, or one that a library registers."""
    name = op.name().lower()
    return ("attn" in name or "attention" in name) and not any(part in name for part in ("backward", "bwd"))


class _Mode(TorchDispatchMode):
    def __init__(self, kept: _Outputs):
        super().__init__()
        self._kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # As torch's own modes of selective checkpointing: compiled kernels run as one operator.
        return True


class _Keeping(_Mode):
    """Keeps the outputs of attention in the first forward."""

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_attention(func):
            self._kept[func].append(tree_map(_alias, out))
        return out


class _Replaying(_Mode):
    """Returns the kept outputs in the second forward, in order; computes what is not kept.

    After a second backward through the same graph nothing is kept, and attention is computed.
    """

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kept = self._kept.get(func)
        if kept:
            out = tree_map(_value, found := kept.pop(0))
            # A layer that changes the output in place would give a kept output the later values.
            if not _changed(found):
                return out
        return func(*args, **(kwargs or {}))


class _Alias:
    def __init__(self, tensor: Tensor):
        # Without this guard the alias would have a version counter of its own, and later changes would go unnoticed.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensor = tensor.detach()
        self.version = self.tensor._version


def _alias(value: object) -> object:
    return _Alias(value) if isinstance(value, Tensor) else value


def _value(value: object) -> object:
    return value.tensor if isinstance(value, _Alias) else value


def _changed(found: Any) -> bool:
    parts = found if isinstance(found, tuple | list) else (found,)
    return any(isinstance(p, _Alias) and p.tensor._version != p.version for p in parts)
