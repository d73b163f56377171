"""Generation with a model's forward: the cache grows in place, a shared prompt is computed once."""

# B responses, R rows that are still computed, U distinct contexts, L tokens, D head dimension

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from or1.rollout.row_bits import fewer_rows
from or1.rollout.row_sampler import RowSampler

_SPARE_TOKENS = 64
# Numbers of rows that are tried are multiples of this one.
_ROW_STEP = 16


def can_decode(model: PreTrainedModel) -> bool:
    """Return True if `decode` serves the model: every layer keeps all keys and values, and nothing else.

    Sliding windows, running states and models with a preparation of their own are left to transformers' `generate`.
    """
    # transformers' types do not declare that a causal language model has `generate`.
    kind: Any = type(model)
    if kind.prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return False
    arguments = inspect.signature(type(model).forward).parameters
    if model.config.is_encoder_decoder or not {"position_ids", "attention_mask", "use_cache"} <= arguments.keys():
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    contexts: Sequence[np.ndarray],
    limits_B: np.ndarray,
    sampler: RowSampler,
    eos_ids: Sequence[int],
    *,
    pad_id: int,
    deadline: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return new tokens, i64[B, L], and their log-probs, f32[B, L], nats; undefined past the end of a response.

    contexts  i32[L] each: prompt and earlier tokens
    limits_B  most tokens to add to each
    deadline  value of time.monotonic() after which no further token is computed

    The tokens are those of `generate` with the same sampler, bit for bit: fewer rows are computed only where
    `fewer_rows` allows it.
    """
    batch = _Rows(model, contexts, pad_id, int(limits_B.max()))
    tokens_BL = np.full((len(contexts), int(limits_B.max())), pad_id, np.int64)
    logp_BL = np.zeros(tokens_BL.shape, np.float32)
    live_B = np.ones(len(contexts), bool)
    logits_RV = batch.prefill()
    for step in range(tokens_BL.shape[1]):
        token_R, logp_R = sampler.sample(logits_RV, batch.rows.tolist())
        tokens_BL[batch.rows, step], logp_BL[batch.rows, step] = token_R.cpu().numpy(), logp_R.cpu().numpy()
        live_B &= ~np.isin(tokens_BL[:, step], eos_ids) & (step + 1 < limits_B)
        if not live_B.any() or time.monotonic() >= deadline:
            return tokens_BL[:, : step + 1], logp_BL[:, : step + 1]
        kept = batch.drop_finished(live_B)
        with _decoding(model):
            logits_RV = batch.forward((token_R if kept is None else token_R[kept])[:, None])
    return tokens_BL, logp_BL


class _Rows:
    """The rows of a batch that are still computed, with their cache.

    rows  indices of the responses, ascending
    """

    def __init__(self, model: PreTrainedModel, contexts: Sequence[np.ndarray], pad_id: int, room: int):
        self.model, self._device = model, model.device
        self.rows = np.arange(len(contexts))
        numbers: dict[bytes, int] = {}
        self._number_B = np.array([numbers.setdefault(ids.tobytes(), len(numbers)) for ids in contexts])
        self._first_U = np.unique(self._number_B, return_index=True)[1]
        self._width = max(len(ids) for ids in contexts)
        self._ids_BL = torch.full((len(contexts), self._width), pad_id)
        mask_BL = torch.ones(len(contexts), self._width + room, dtype=torch.int64)
        for row, ids in enumerate(contexts):
            self._ids_BL[row, self._width - len(ids) :] = torch.as_tensor(ids)
            mask_BL[row, : self._width - len(ids)] = 0
        self._mask_RL = mask_BL.to(self._device)
        self._padded_B = np.array([len(ids) < self._width for ids in contexts])
        # As many live rows or fewer: a smaller batch may do.
        self._next_try = 7 * len(contexts) // 8
        self._cache = DynamicCache(config=model.config)
        self._layers = [_GrowingLayer() for _ in self._cache.layers]
        self._cache.layers = [*self._layers]
        arguments = inspect.signature(type(model).forward).parameters
        # transformers has renamed the argument in 5.2x.
        self._options: dict[str, Any] = {"cache" if "cache" in arguments else "past_key_values": self._cache}
        self._options |= {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}

    def prefill(self) -> Tensor:
        """Return the logits of the first token, float[B, V]; equal contexts are computed as few times as allowed."""
        full, distinct = len(self.rows), len(self._first_U)
        candidates = [distinct * times for times in (1, 2, 4, 8, 16) if 2 * distinct * times <= full]
        count = min(fewer_rows(self.model, candidates, full, self._width), default=full)
        if count == full:
            return self._forward(self._ids_BL, self._mask_RL[:, : self._width])
        computed = np.resize(self._first_U, count)
        logits_UV = self._forward(self._ids_BL[computed], self._mask_RL[computed, : self._width])
        rows = torch.as_tensor(self._number_B, device=self._device)
        self._select(rows)
        return logits_UV[rows]

    def forward(self, ids_R1: Tensor) -> Tensor:
        """Add one token, i64[R, 1], to every row and return the logits of the next one, float[R, V]."""
        return self._forward(ids_R1, self._mask_RL[:, : self._cache.get_seq_length() + 1])

    def _forward(self, ids_RL: Tensor, mask_RL: Tensor) -> Tensor:
        positions_RL = (mask_RL.cumsum(-1) - 1).masked_fill(mask_RL == 0, 0)[:, -ids_RL.shape[1] :]
        # transformers declares no type of the output that all models share.
        output: Any = self.model(
            input_ids=ids_RL.to(self._device),
            attention_mask=mask_RL,
            position_ids=positions_RL,
            use_cache=True,
            return_dict=True,
            **self._options,
        )
        return output.logits[:, -1]

    def drop_finished(self, live_B: np.ndarray) -> Tensor | None:
        """Leave out finished rows. Return the rows kept, indices into the present ones; None: all of them."""
        live_R = live_B[self.rows]
        if live_R.sum() > self._next_try:
            return None
        sizes = sorted({-(-len(live_B) * eighths // 8 // _ROW_STEP) * _ROW_STEP for eighths in range(1, 8)})
        allowed = fewer_rows(self.model, [size for size in sizes if size < len(live_B)], len(live_B))
        below = [size for size in allowed if size < live_R.sum()]
        self._next_try = max(below, default=0)
        size = min((size for size in allowed if size >= live_R.sum()), default=len(live_B))
        if size >= len(self.rows):
            return None
        # Masks of a batch without padding are left out, which is another kernel: keep a padded row if there is one.
        padded_R = self._padded_B[self.rows]
        rank_R = np.where(live_R, 0, np.where(padded_R, 1, 2))
        kept = np.sort(np.argsort(rank_R, kind="stable")[:size])
        if padded_R.any() and not padded_R[kept].any():
            return None
        self.rows = self.rows[kept]
        kept_R = torch.as_tensor(kept, device=self._device)
        self._mask_RL = self._mask_RL[kept_R]
        self._select(kept_R)
        return kept_R

    def _select(self, rows_R: Tensor) -> None:
        for layer in self._layers:
            layer.select(rows_R)


class _GrowingLayer(DynamicLayer):
    """A layer of transformers' cache with spare room, so that a token does not copy all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self._key_buffer = self._value_buffer = torch.empty(0, 0, 0, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append float[R, heads, new, D] and return all keys and values, float[R, heads, L, D], as views."""
        used = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._key_buffer = _appended(self._key_buffer, used, key_states)
        self._value_buffer = _appended(self._value_buffer, used, value_states)
        return self._show(used + key_states.shape[2])

    def select(self, rows_R: Tensor) -> None:
        """Keep the rows with these indices, i64[R]; an index may occur several times."""
        self._key_buffer, self._value_buffer = self._key_buffer[rows_R], self._value_buffer[rows_R]
        self._show(self.get_seq_length())

    def _show(self, used: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._key_buffer[:, :, :used], self._value_buffer[:, :, :used]
        return self.keys, self.values


def _appended(buffer: Tensor, used: int, new: Tensor) -> Tensor:
    """Return a buffer that holds `new`, float[R, heads, L, D], after its first `used` tokens; grown if it is full."""
    end = used + new.shape[2]
    if buffer.shape[2] < end:
        grown = new.new_empty(*new.shape[:2], end + max(_SPARE_TOKENS, end // 4), new.shape[3])
        if used:
            grown[:, :, :used] = buffer[:, :, :used]
        buffer = grown
    buffer[:, :, used:end] = new
    return buffer


def _decoding(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Return transformers' own context for single tokens, which chooses another kernel for experts on a GPU."""
    return getattr(model, "_optimize_model_for_decode", nullcontext)()
