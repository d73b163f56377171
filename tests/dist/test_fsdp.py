"""The gradient norm of one process against fp64, and that of several ranks against one process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from or1.dist.fsdp import total_norm
from or1.dist.world import SINGLE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_large_gradients_is_exact(dtype: torch.dtype) -> None:
    # torch's own norm of the first, 4 M elements, is 8e-5 off on a CPU.
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=generator).to(dtype) for size in ((4096, 1025), (7,), (2**18 + 5,))]
    exact = sum(float(grad.double().square().sum()) for grad in grads) ** 0.5
    found = total_norm([grads[0].T, *grads[1:]], SINGLE)
    assert found.dtype == torch.float32 and float(found) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_shards_in_16_bits_is_that_of_one_process(dtype: torch.dtype) -> None:
    grads = [torch.full((3, 5), 300.3).to(dtype), torch.empty(0, dtype=dtype), torch.full((4,), 1e-4).to(dtype)]
    ranks = SimpleNamespace(size=2, in_first_replica=True, sum=lambda squares: squares)
    assert float(total_norm(grads, ranks)) == pytest.approx(float(total_norm(grads, SINGLE)), rel=1e-6)
