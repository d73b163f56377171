"""Does a matrix product keep its bits with fewer rows? Libraries choose kernels by the number of rows.

A kernel that adds in another order gives other last bits. So the embedded engine leaves out rows of a batch only where
`same_bits` has found that the order stays the same on this machine.
"""

# M rows of a batch, N outputs, K inputs

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from or1_kernels.lm_head import LMHead

# Rows and outputs with numbers of their own; more of them repeat these.
_DISTINCT = 509
# A larger weight is not tried, because the trial needs a second one like it.
_MOST_BYTES = 2**30


def fewer_rows(model: PreTrainedModel, candidates: Sequence[int], full: int, tokens: int = 1) -> list[int]:
    """Return the candidates whose rows have the bits that they have in `full` rows, ascending.

    candidates  numbers of rows below `full`
    tokens      tokens of each row in the decoder; the head computes one

    There is none on a GPU, where attention kernels depend on the number of rows too. There is none either for a model
    with weights outside of linear layers, such as experts.
    """
    if not candidates or model.device.type != "cpu" or not _is_linear(model):
        return []
    head = model.get_output_embeddings()
    inner = {(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    # Under FSDP2, the weights have the dtype of the computation only while they are gathered, which they are here.
    dtype, threads = model.get_input_embeddings().weight.dtype, torch.get_num_threads()
    found = same_bits(tuple(candidates), full, head.in_features, head.out_features, dtype, threads)
    in_decoder = tuple(rows * tokens for rows in candidates)
    for inputs, outputs in sorted(inner):
        same = same_bits(in_decoder, full * tokens, inputs, outputs, dtype, threads)
        found &= {rows // tokens for rows in same}
    return sorted(found)


def _is_linear(model: nn.Module) -> bool:
    """Return True if all matrices of the model belong to plain linear layers or embeddings."""
    return all(
        type(module) in (nn.Linear, LMHead) or isinstance(module, nn.Embedding)
        for module in model.modules()
        if any(p.ndim > 1 for p in module.parameters(recurse=False))
    )


@lru_cache(maxsize=4096)
def same_bits(
    candidates: tuple[int, ...], full: int, inputs: int, outputs: int, dtype: torch.dtype, threads: int
) -> frozenset[int]:
    """Return the numbers of rows that keep their bits of `full` rows, times a weight [outputs, inputs], on this CPU.

    Every exact product is 0, so that the computed one is nothing but rounding errors. These differ as soon as the order
    of additions does, while real products in bf16 would hide most differences. `threads` is the present number of
    threads; kernels depend on it.
    """
    if inputs < 2 or outputs * inputs * dtype.itemsize > _MOST_BYTES:
        return frozenset()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(inputs // 2, generator=generator)
    x_MK = _mirrored(full, inputs, order, 1, generator=generator).to(dtype)
    weight_NK = _mirrored(outputs, inputs, order, -1, generator=generator).to(dtype)
    with torch.no_grad():
        full_MN = nn.functional.linear(x_MK, weight_NK)

        def keeps(count: int) -> bool:
            # Rows from everywhere: a row must keep its bits at another place of the batch too.
            rows = torch.arange(count) * full // count
            return torch.equal(nn.functional.linear(x_MK[rows], weight_NK), full_MN[rows])

        return frozenset(count for count in candidates if keeps(count))


def _mirrored(rows: int, columns: int, order: Tensor, sign: int, *, generator: torch.Generator) -> Tensor:
    """Return random numbers, f32[rows, columns]: the right half is the left one, in `order`, times `sign`."""
    shape = (min(rows, _DISTINCT), len(order))
    # Of many magnitudes, because sums of few numbers of one magnitude are often exact.
    left = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-6, 7, shape, generator=generator)
    middle = left.new_zeros(len(left), columns - 2 * len(order))
    repeated = torch.arange(rows) % len(left)
    return torch.cat([left, middle, sign * left[:, order]], dim=1)[repeated]
