"""The forward pass: packed rows to hidden states of the trained tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from or1.dist.fsdp import is_sharded
from or1.model import attention
from or1.model.mask_check import without_mask_check
from or1.model.rows import Microbatch
from or1_kernels.lm_head import LMHead


def hidden_states(model: PreTrainedModel, batch: Microbatch, sequence_group: ProcessGroup | None = None) -> Tensor:
    """Return final hidden states float[T, H] of a packed row, after the last norm; documents are isolated.

    With a `sequence_group`, `batch` is this rank's slice of the row (`or1.model.slices.my_slice`) and T its length.
    """
    layout = attention.Layout.of(batch)
    decode: Any = model.decode if is_sharded(model) else model.get_decoder()
    with attention.packed_forward(), without_mask_check():
        output = decode(
            input_ids=batch.ids_T[None],
            position_ids=batch.positions_T[None],
            # With a cache, even an empty one, transformers would attend across documents.
            use_cache=False,
            **layout.as_kwargs(),
            **({} if sequence_group is None else {"sequence_group": sequence_group}),
        )
    return output.last_hidden_state[0]


def trained_rows(hidden_TH: Tensor, batch: Microbatch) -> Tensor:
    """Return hidden_TH[rows_N], float[N, H]: the hidden states that predict the trained tokens.

    Rows repeat where responses share a prompt. The backward of plain indexing adds repeated rows in thread order, so
    its last bits differ from run to run. The backward of an embedding adds them in a fixed order.
    """
    return nn.functional.embedding(batch.rows_N, hidden_TH)


def lm_head(model: PreTrainedModel) -> LMHead:
    """Return the model's LMHead."""
    return model.get_output_embeddings()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set eval mode and disable gradients; restore the former mode on exit."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
