"""Sequences -> packed rows: several documents in one row, each attending only to itself.

A sequence is its prompt and all but the last token of its response: the last token is predicted but predicts nothing.
Sequences with the same prompt may share one copy of it (or1.model.shared_prompts).
"""

# T packed tokens of a row, S documents of a row, N trained tokens of a row, U keys of all documents

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from or1.core.types import TrainSequence
from or1.model.row_plan import plan_rows
from or1.model.shared_prompts import Sharing, Unit, make_units, unit_rows


@dataclass(frozen=True)
class Microbatch:
    """One packed row on the device.

    ids_T, positions_T  i64[T]; positions restart at 0 in every document
    cu_seqlens          i32[S+1], document boundaries
    max_seqlen          longest document
    cu_keys             i32[S+1], boundaries of the documents' keys, which begin with a shared prompt; else cu_seqlens
    max_keys            most keys of a document
    kv_rows_U           i64[U], packed rows of those keys; None where nothing is shared
    rows_N              i64[N], packed positions whose hidden state predicts a trained token, twice for shared ones
    targets_N           i64[N], those tokens
    advantages_N        float[N]
    rollout_logp_N      float[N], the engine's log-probabilities
    lengths_N           float[N], trained tokens of the sequence that a token belongs to
    old_logp_N          float[N], or None when on-policy
    ref_logp_N          float[N], or None without a reference model
    """

    ids_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    cu_keys: Tensor
    max_keys: int
    rows_N: Tensor
    targets_N: Tensor
    advantages_N: Tensor
    rollout_logp_N: Tensor
    lengths_N: Tensor
    old_logp_N: Tensor | None = None
    ref_logp_N: Tensor | None = None
    kv_rows_U: Tensor | None = None


def pack(
    sequences: Sequence[TrainSequence],
    max_tokens: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    sharing: Sharing = "off",
) -> list[Microbatch]:
    """Best-fit packed rows of at most `max_tokens` tokens, their floats in `dtype`.

    Every sequence is in exactly one row, whole. Raises ValueError if a sequence is longer than `max_tokens`.
    """
    return [batch for _, batch in pack_indexed(sequences, max_tokens, device, dtype, sharing)]


def pack_indexed(
    sequences: Sequence[TrainSequence],
    max_tokens: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    sharing: Sharing = "off",
) -> Iterator[tuple[list[int], Microbatch]]:
    """As `pack`, each row with the indices of its sequences in the order in which they stand in it."""
    units = units_of(sequences, max_tokens, sharing)
    rows = [[units[u] for u in row] for row in plan_rows([unit.tokens for unit in units], max_tokens)]
    indices = [[i for unit in row for i in unit.members] for row in rows]
    return zip(indices, pack_rows(sequences, rows, device, dtype), strict=True)


def units_of(sequences: Sequence[TrainSequence], max_tokens: int, sharing: Sharing) -> list[Unit]:
    """What a plan of rows (or1.model.row_plan) deals out: sequences alone, or with others that share their prompt."""
    return make_units([s.prompt_ids for s in sequences], [s.trained_tokens for s in sequences], max_tokens, sharing)


def pack_rows(
    sequences: Sequence[TrainSequence],
    rows: Sequence[Sequence[Unit | int]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Microbatch]:
    """Rows of a plan (one rank's share of `balance.plan_ranks`): units, or sequences by index, in the order given.

    A row of nothing is an anchor, one token that nothing is trained on: its loss is 0 and its backward makes the same
    collective calls as any other row's.
    """
    for row in rows:
        units = [u if isinstance(u, Unit) else Unit((u,), sequences[u].packed_tokens) for u in row]
        yield _to_microbatch(sequences, units, device, dtype) if units else _anchor(device, dtype)


def _anchor(device: torch.device | str, float_dtype: torch.dtype) -> Microbatch:
    token, nothing = torch.zeros(1, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int64, device=device)
    floats = torch.empty(0, dtype=float_dtype, device=device)
    bounds = torch.tensor([0, 1], dtype=torch.int32, device=device)
    # An objective with a KL term asks for reference log-probs, be they none; old ones may always be absent.
    return Microbatch(token, token, bounds, 1, bounds, 1, nothing, nothing, floats, floats, floats, ref_logp_N=floats)


def _to_microbatch(
    all_sequences: Sequence[TrainSequence], units: list[Unit], device: torch.device | str, float_dtype: torch.dtype
) -> Microbatch:
    sequences = [all_sequences[i] for unit in units for i in unit.members]
    ids, positions, rows, q_lens, key_rows = [], [], [], [], []
    start = 0
    for unit in units:
        members = [all_sequences[i] for i in unit.members]
        prompt = members[0].prompt_ids
        placed = unit_rows(len(prompt), [s.trained_tokens for s in members])
        ids += [prompt, *(s.response_ids[:-1] for s in members)]
        positions.append(placed.positions)
        rows += [start + r for r in placed.predicts]
        q_lens += placed.q_lens
        key_rows += [start + k for k in placed.key_rows]
        start += unit.tokens

    def to_device(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(array, dtype=dtype).to(device)

    def floats(parts: list[np.ndarray]) -> Tensor:
        return to_device(np.concatenate(parts), float_dtype)

    def optional(name: str) -> Tensor | None:
        parts = [logp for s in sequences if (logp := getattr(s, name)) is not None]
        if parts and len(parts) != len(sequences):
            raise ValueError(f"{len(parts)} of {len(sequences)} sequences have {name}; give it to all or to none")
        return floats(parts) if parts else None

    k_lens = [len(k) for k in key_rows]
    shared = k_lens != q_lens
    cu_seqlens = to_device(np.cumsum([0, *q_lens]), torch.int32)
    return Microbatch(
        ids_T=to_device(np.concatenate(ids), torch.int64),
        positions_T=to_device(np.concatenate(positions), torch.int64),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(q_lens),
        cu_keys=to_device(np.cumsum([0, *k_lens]), torch.int32) if shared else cu_seqlens,
        max_keys=max(k_lens),
        rows_N=to_device(np.concatenate(rows), torch.int64),
        targets_N=to_device(np.concatenate([s.response_ids for s in sequences]), torch.int64),
        advantages_N=floats([np.full(s.trained_tokens, s.advantage) for s in sequences]),
        rollout_logp_N=floats([s.rollout_logp for s in sequences]),
        lengths_N=floats([np.full(s.trained_tokens, s.known_tokens) for s in sequences]),
        old_logp_N=optional("old_logp"),
        ref_logp_N=optional("ref_logp"),
        kv_rows_U=to_device(np.concatenate(key_rows), torch.int64) if shared else None,
    )


def keep_known(batch: Microbatch) -> Microbatch:
    """A packed row without those tokens among the trained ones; as context of later tokens they stay."""
    known_N = batch.rollout_logp_N.isfinite()
    if known_N.all():
        return batch
    per_token = ("rows_N", "targets_N", "advantages_N", "rollout_logp_N", "lengths_N", "old_logp_N", "ref_logp_N")
    present = {name: values for name in per_token if (values := getattr(batch, name)) is not None}
    return replace(batch, **{name: values[known_N] for name, values in present.items()})
