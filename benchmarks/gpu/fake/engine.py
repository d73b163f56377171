"""Backward passes in Python, for fake CUDA tensors.

torch's own engine asks the CUDA driver for streams, so it fails on a machine without a GPU, for fake tensors too. This
engine calls the same nodes in the same order. It keeps no graph after use and runs no tensor pre-hooks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Gradients that reached a node, by output of the node; None where none did.
_Pending = dict[Any, list[Tensor | None]]


def backward(tensors: Tensor | Sequence[Tensor], grad_tensors: Any = None, *_: Any, **__: Any) -> None:
    """Run torch.autograd.backward: add gradients to `.grad` of the leaves."""
    _run(_as_tuple(tensors), _as_tuple(grad_tensors), {})


def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **_: Any) -> tuple[Tensor | None, ...]:
    """Run torch.autograd.grad: return the gradients of `inputs`, None for one that no gradient reaches."""
    edges = [torch.autograd.graph.get_gradient_edge(x) for x in _as_tuple(inputs)]
    wanted: _Pending = {edge.node: [] for edge in edges}
    _run(_as_tuple(outputs), _as_tuple(grad_outputs), wanted)
    return tuple(wanted[e.node][e.output_nr] if e.output_nr < len(wanted[e.node]) else None for e in edges)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Replace torch.autograd.backward and torch.autograd.grad within the block."""
    before = torch.autograd.backward, torch.autograd.grad
    torch.autograd.backward, torch.autograd.grad = backward, grad  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.backward, torch.autograd.grad = before  # type: ignore[assignment]


def _as_tuple(x: Any) -> tuple:
    return tuple(x) if isinstance(x, list | tuple) else (x,)


def _run(outputs: tuple, grads: tuple, wanted: _Pending) -> None:
    """Run the nodes below `outputs`, users before producers. Fill `wanted`, or the `.grad` of leaves if it is {}."""
    pending: _Pending = {}
    for i, output in enumerate(outputs):
        upstream = grads[i] if i < len(grads) and grads[i] is not None else torch.ones_like(output)
        edge = torch.autograd.graph.get_gradient_edge(output)
        _add(pending, edge.node, edge.output_nr, upstream)
    users = _users(list(pending))
    ready = [node for node in pending if not users[node]]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            arrived = pending.pop(node, [])
            if node in wanted:
                wanted[node] = arrived
            results = _apply(node, arrived, leaves=not wanted)
            for (child, index), gradient in zip(_edges(node), results, strict=True):
                if gradient is not None:
                    _add(pending, child, index, _fitted(gradient, child._input_metadata[index]))
                users[child] -= 1
                if not users[child]:
                    ready.append(child)


def _edges(node: Any) -> list[tuple[Any, int]]:
    return [(child, index) for child, index in node.next_functions if child is not None]


def _users(roots: list) -> dict[Any, int]:
    """Return how many edges lead to each node that `roots` reach."""
    count = dict.fromkeys(roots, 0)
    stack = list(roots)
    while stack:
        for child, _ in _edges(stack.pop()):
            if child not in count:
                count[child] = 0
                stack.append(child)
            count[child] += 1
    return count


def _add(pending: _Pending, node: Any, index: int, gradient: Tensor) -> None:
    slots = pending.setdefault(node, [])
    slots.extend([None] * (index + 1 - len(slots)))
    have = slots[index]
    slots[index] = gradient if have is None else have + gradient


def _apply(node: Any, arrived: list[Tensor | None], leaves: bool) -> list[Tensor | None]:
    """Return the node's gradients, one for each of its edges; all None if no gradient arrived."""
    edges = _edges(node)
    if all(x is None for x in arrived) or (type(node).__name__ == "AccumulateGrad" and not leaves):
        return [None] * len(edges)
    arrived = arrived + [None] * (len(node._input_metadata) - len(arrived))
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        # As torch does: backward of a Function gets zeros where no gradient arrived.
        filled = [_zeros(m) if x is None else x for x, m in zip(arrived, node._input_metadata, strict=True)]
        results = _as_tuple(node.apply(*filled))
        return [r for r, needed in zip(results, node.needs_input_grad, strict=False) if needed]
    results = _as_tuple(node(*arrived))
    if not node.next_functions:  # a leaf
        return []
    return [r for r, (child, _) in zip(results, node.next_functions, strict=True) if child is not None]


def _fitted(gradient: Tensor, metadata: Any) -> Tensor:
    """Return a gradient in the shape and dtype of the value, as torch's engine does for values that were broadcast."""
    if gradient.device != metadata.device:
        raise RuntimeError(f"a gradient on {gradient.device} arrived at a value on {metadata.device}")
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    return gradient.to(metadata.dtype)


def _zeros(metadata: Any) -> Tensor:
    return torch.zeros(metadata.shape, dtype=metadata.dtype, device=metadata.device)
