"""A weight that needs no gradient costs no third GEMM and no buffer of its size, in every implementation."""

# N rows, H hidden, V vocab

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from or1_kernels import linear_logprob_entropy, linear_policy_loss

from .conftest import make_case

N, H, V = 24, 64, 512
CASE = make_case(N, H, V)
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}


class Watch(TorchDispatchMode):
    """Counts matrix products, and records the shapes of the tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in PRODUCTS
        self.shapes |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out


def loss_of(hidden: Tensor, weight: Tensor, impl: str, chunk_rows: int) -> Tensor:
    options = CASE.options | {"impl": impl, "chunk_rows": chunk_rows}
    return linear_policy_loss(hidden, weight, CASE.targets, CASE.advantages, **options)[0]


def scores_of(hidden: Tensor, weight: Tensor, impl: str, chunk_rows: int) -> Tensor:
    logp, entropy = linear_logprob_entropy(hidden, weight, CASE.targets, impl=impl, chunk_rows=chunk_rows)
    return (logp + 0.1 * entropy).sum()


@pytest.mark.parametrize("call", [loss_of, scores_of])
def test_a_frozen_weight_costs_one_product_less_and_no_buffer(impl: str, call: Callable[..., Tensor]) -> None:
    chunks = 3
    found = {}
    for frozen in (False, True):
        hidden = CASE.hidden.clone().requires_grad_()
        weight = CASE.weight.clone().requires_grad_(not frozen)
        with Watch() as watch:
            call(hidden, weight, impl, N // chunks).backward()
        assert hidden.grad is not None and (weight.grad is None) == frozen
        found[frozen] = watch, hidden.grad
    # Scores recompute the logits in backward.
    forwards = 2 if call is scores_of else 1
    assert found[False][0].products == (forwards + 2) * chunks
    assert found[True][0].products == (forwards + 1) * chunks
    # The weight itself is returned by views alone.
    assert (V, H) in found[False][0].shapes and (V, H) not in found[True][0].shapes
    assert torch.equal(found[False][1], found[True][1])
