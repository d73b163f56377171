"""Bytes of the tensors that a real model, its optimizer and its backward pass hold, to compare with a plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from or1.model.forward import hidden_states, lm_head, trained_rows
from or1.model.rows import Microbatch


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that autograd saves for one packed row, in the layers and in the head.

    Each storage counts once. Parameters do not count.
    """

    layers: int
    head: int


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages behind `tensors`."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def saved_bytes(model: PreTrainedModel, batch: Microbatch) -> SavedBytes:
    """Run one forward pass with its loss, and return the bytes saved for backward."""
    count = _Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda tensor: tensor):
        hidden_TH = hidden_states(model, batch)
        layers = count.total()
        loss = row_loss(model, hidden_TH, batch, trained=len(batch.rows_N))
        head = count.total() - layers
    del loss
    return SavedBytes(layers, head)


def row_loss(model: PreTrainedModel, hidden_TH: Tensor, batch: Microbatch, trained: int) -> Tensor:
    """Return the policy loss of a packed row as in the update; `trained` is the denominator."""
    loss, _ = lm_head(model)(
        trained_rows(hidden_TH, batch),
        batch.targets_N,
        advantages=batch.advantages_N,
        token_weight=torch.full_like(batch.advantages_N, 1 / trained),
    )
    return loss


class _Saved:
    """A pack hook that records storages. It keeps the tensors, because a freed storage's address could be reused."""

    def __init__(self, model: nn.Module):
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._seen: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._parameters:
            self._seen.setdefault(address, tensor.detach())
        return tensor

    def total(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self._seen.values())
