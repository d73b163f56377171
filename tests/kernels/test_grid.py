"""Real vocabularies and row counts, every objective and every choice of inputs that want gradients, against fp64.

The tolerance is that of test_head: error at most twice plain torch's in the same dtype. H is small, so that full
vocabularies cost seconds; the row passes, which are what is ours, see every column.
Legend: N rows, H hidden, V vocab.
"""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from or1_kernels import linear_policy_loss
from tests.helpers.objectives import OBJECTIVES

# (V, N, objective, dtype): every vocabulary, row count and objective, in two dtypes; LARGE adds the slow products.
GRID = [
    (7, 0, "ppo", torch.float32),
    (7, 1, "clip_higher", torch.bfloat16),
    (7, 127, "cispo", torch.float32),
    (7, 4097, "ppo_kl_is", torch.bfloat16),
    (7, 4097, "cispo_kl", torch.float32),
    (50257, 0, "ppo", torch.bfloat16),
    (50257, 127, "ppo_kl_is", torch.float32),
    (129920, 1, "cispo", torch.float32),
    (151936, 1, "cispo_kl", torch.bfloat16),
    (152064, 1, "ppo_kl_is", torch.float32),
    (152064, 0, "cispo", torch.bfloat16),
]
LARGE = [
    pytest.param(151936, 127, "clip_higher", torch.float32, marks=pytest.mark.slow),
    pytest.param(129920, 127, "ppo", torch.bfloat16, marks=pytest.mark.slow),
    pytest.param(152064, 127, "cispo_kl", torch.bfloat16, marks=pytest.mark.slow),
    pytest.param(50257, 4097, "ppo_kl_is", torch.float32, marks=pytest.mark.nightly),
]


def blocks(case, run, size=128):
    """`run` on `size` rows at a time: full logits of all rows in fp64 would not fit."""
    n = len(case.targets)
    parts = [run(case.rows(slice(i, i + size))) for i in range(0, n, size)] or [run(case)]
    joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("logp", "entropy", "dhidden")}
    return SimpleNamespace(**joined, dweight=sum(p.dweight for p in parts))


_last = {}


def prepared(kit, *key):
    """(case, plain torch in its dtype, truth) of a grid point; the last one is kept for the next implementation."""
    if key not in _last:
        _last.clear()
        v, n, objective, dtype = key
        case = kit.make_case(n, 8, v, dtype=dtype, objective=kit.objectives[objective])
        # Plain torch in one go: a sum over blocks in bf16 would add rounding that it does not have.
        _last[key] = case, kit.plain(case), blocks(case.to(torch.float64), kit.plain)
    return _last[key]


@pytest.mark.parametrize(("v", "n", "objective", "dtype"), [*GRID, *LARGE], ids=lambda x: str(x).removeprefix("torch."))
def test_real_vocabularies(kit, impl, v, n, objective, dtype):
    case, peer, truth = prepared(kit, v, n, objective, dtype)
    kit.assert_as_exact(kit.policy(case, impl=impl), peer, truth)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_choice_of_inputs_that_want_a_gradient(kit, impl, objective):
    """hidden, weight and bias in all eight combinations: each wanted gradient is as exact, no other is made."""
    case = kit.make_case(61, 16, 211, objective=kit.objectives[objective], bias=torch.linspace(-1, 1, 211))

    def gradients(case, needs, impl):
        leaves = [
            x.clone().requires_grad_(need)
            for x, need in zip((case.hidden, case.weight, case.options["bias"]), needs, strict=True)
        ]
        options = case.options | {"bias": leaves[2]}
        loss, _ = linear_policy_loss(*leaves[:2], case.targets, case.advantages, impl=impl, chunk_rows=25, **options)
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.backward()
        return [x.grad for x in leaves]

    peer = gradients(case, (True,) * 3, "reference")
    truth = gradients(case.to(torch.float64), (True,) * 3, "reference")
    for needs in product((True, False), repeat=3):
        got = gradients(case, needs, impl)
        assert [g is not None for g in got] == list(needs)
        for g, p, t in zip(got, peer, truth, strict=True):
            if g is not None:
                kit.assert_as_exact(SimpleNamespace(g=g), SimpleNamespace(g=p), SimpleNamespace(g=t), names=("g",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_vocabulary_is_bitwise_reproducible_and_permutable(kit, impl, dtype):
    case = kit.make_case(24, 8, 151936, dtype=dtype)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    first, again = kit.policy(case, impl=impl, chunk_rows=9), kit.policy(case, impl=impl, chunk_rows=9)
    moved = kit.policy(case.rows(order), impl=impl, chunk_rows=9)
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
    for name in ("logp", "entropy", "ratio", "dhidden"):
        assert torch.equal(getattr(first, name)[order], getattr(moved, name)), name
