"""The policy from packed rows to the hidden states of the trained tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from or1.dist.fsdp import is_sharded
from or1.model import attention
from or1.model.rows import Microbatch
from or1_kernels.lm_head import LMHead


def hidden_states(model: PreTrainedModel, batch: Microbatch, sequence_group: ProcessGroup | None = None) -> Tensor:
    """Final hidden states [T, H] of a packed row, after the last norm; documents do not see each other.

    With a `sequence_group`, `batch` is this rank's slice of the row (`sequence_parallel.my_slice`), and so is T.
    """
    layout = attention.Layout(batch.cu_seqlens, batch.cu_keys, batch.max_seqlen, batch.max_keys, batch.kv_rows_U)
    with attention.packed_forward():
        output = (model.decode if is_sharded(model) else model.get_decoder())(
            input_ids=batch.ids_T[None],
            position_ids=batch.positions_T[None],
            # A cache, even an empty one, would make transformers attend across documents.
            use_cache=False,
            **layout.as_kwargs(),
            **({} if sequence_group is None else {"sequence_group": sequence_group}),
        )
    return output.last_hidden_state[0]


def trained_rows(hidden_TH: Tensor, batch: Microbatch) -> Tensor:
    """hidden_TH[rows_N], float[N, H]: the hidden states that predict the trained tokens.

    Rows repeat where responses share a prompt. The gradient of plain indexing adds repeated rows up in the order in
    which threads come to them, which moves its last bit from run to run; that of an embedding has a fixed order.
    """
    return nn.functional.embedding(batch.rows_N, hidden_TH)


def lm_head(model: PreTrainedModel) -> LMHead:
    """The model's LMHead."""
    return model.get_output_embeddings()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; the former mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
