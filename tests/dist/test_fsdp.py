"""The gradient norm of one process against fp64."""

from __future__ import annotations

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
