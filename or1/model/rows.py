"""Packed rows: several documents in one row, each attending only to itself.

A document is a prompt and all but the last token of its response: the last token is predicted, but predicts nothing.
Sequences with the same prompt may share one copy of the prompt (or1.model.shared_prompts).
"""

# T packed tokens of a row, S documents of a row, N trained tokens of a row, U keys of all documents

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from or1.core.types import TrainSequence
from or1.model.boundaries import boundaries
from or1.model.row_plan import plan_rows
from or1.model.shared_prompts import Sharing, Unit, make_units, unit_rows


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One packed row on the device.

    ids_T, positions_T  i64[T]; positions restart at 0 in every document
    cu_seqlens          i32[S+1], cumulative document lengths, from 0
    max_seqlen          length of the longest document
    cu_keys             i32[S+1], cumulative key counts; a document's keys include a shared prompt. Else cu_seqlens
    max_keys            largest key count of a document
    kv_rows_U           i64[U], packed rows of all keys; None if no prompt is shared
    rows_N              i64[N], packed rows whose hidden state predicts a trained token; repeated for shared prompts
    targets_N           i64[N], the trained tokens
    advantages_N        float[N]
    rollout_logp_N      float[N], the engine's log-probabilities, nats
    lengths_N           float[N], number of trained tokens in the sequence of each token
    sequences_N         i64[N], number of the sequence of each token
    old_logp_N          float[N], nats, or None when on-policy
    ref_logp_N          float[N], nats, or None without a reference model
    all_known           whether every `rollout_logp_N` is known to be finite, so that nobody has to ask the device
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
    sequences_N: Tensor
    old_logp_N: Tensor | None = None
    ref_logp_N: Tensor | None = None
    kv_rows_U: Tensor | None = None
    all_known: bool = False


def pack_indexed(
    sequences: Sequence[TrainSequence],
    max_tokens: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    sharing: Sharing = "off",
) -> Iterator[tuple[list[int], Microbatch]]:
    """Yield best-fit packed rows of at most `max_tokens` tokens, each with the indices of its sequences in row order.

    Every sequence is whole, in exactly one row. Floats have the type `dtype`.
    Raises ValueError if a sequence is longer than `max_tokens`.
    """
    units = units_of(sequences, max_tokens, sharing)
    rows = [[units[u] for u in row] for row in plan_rows([unit.tokens for unit in units], max_tokens)]
    indices = [[i for unit in row for i in unit.members] for row in rows]
    return zip(indices, pack_rows(sequences, rows, device, dtype), strict=True)


def units_of(sequences: Sequence[TrainSequence], max_tokens: int, sharing: Sharing) -> list[Unit]:
    """Return the units that or1.model.row_plan assigns to rows: single sequences, or groups that share a prompt."""
    return make_units([s.prompt_ids for s in sequences], [s.trained_tokens for s in sequences], max_tokens, sharing)


def pack_rows(
    sequences: Sequence[TrainSequence],
    rows: Sequence[Sequence[Unit | int]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Microbatch]:
    """Yield packed rows for one rank's part of `or1.model.row_plan.plan_ranks`: units or sequence indices, in order.

    An empty row becomes an anchor: one untrained token with a loss of 0, so this rank makes the same collective calls
    as the others.
    """
    for row in rows:
        units = [u if isinstance(u, Unit) else Unit((u,), sequences[u].packed_tokens) for u in row]
        yield _to_microbatch(sequences, units, device, dtype) if units else _anchor(device, dtype)


def _anchor(device: torch.device | str, float_dtype: torch.dtype) -> Microbatch:
    token, no_rows = torch.zeros(1, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int64, device=device)
    no_floats = torch.empty(0, dtype=float_dtype, device=device)
    bounds = torch.tensor([0, 1], dtype=torch.int32, device=device)
    return Microbatch(
        ids_T=token,
        positions_T=token,
        cu_seqlens=bounds,
        max_seqlen=1,
        cu_keys=bounds,
        max_keys=1,
        rows_N=no_rows,
        targets_N=no_rows,
        advantages_N=no_floats,
        rollout_logp_N=no_floats,
        lengths_N=no_floats,
        sequences_N=no_rows,
        # An objective with a KL term needs a tensor here, even an empty one; old log-probs may be None.
        ref_logp_N=no_floats,
    )


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
            raise ValueError(f"{len(parts)} of {len(sequences)} sequences have {name}; set {name} on all or on none")
        return floats(parts) if parts else None

    k_lens = [len(k) for k in key_rows]
    shared = k_lens != q_lens
    cu_seqlens = boundaries(q_lens, device)
    return Microbatch(
        ids_T=to_device(np.concatenate(ids), torch.int64),
        positions_T=to_device(np.concatenate(positions), torch.int64),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(q_lens),
        cu_keys=boundaries(k_lens, device) if shared else cu_seqlens,
        max_keys=max(k_lens),
        rows_N=to_device(np.concatenate(rows), torch.int64),
        targets_N=to_device(np.concatenate([s.response_ids for s in sequences]), torch.int64),
        advantages_N=floats([np.full(s.trained_tokens, s.advantage) for s in sequences]),
        rollout_logp_N=floats([s.rollout_logp for s in sequences]),
        lengths_N=floats([np.full(s.trained_tokens, s.known_tokens) for s in sequences]),
        sequences_N=to_device(np.repeat(np.arange(len(sequences)), [s.trained_tokens for s in sequences]), torch.int64),
        old_logp_N=optional("old_logp"),
        ref_logp_N=optional("ref_logp"),
        kv_rows_U=to_device(np.concatenate(key_rows), torch.int64) if shared else None,
        all_known=all(np.isfinite(s.rollout_logp).all() for s in sequences),
    )


def keep_known(batch: Microbatch) -> Microbatch:
    """Return the row without training on tokens whose `rollout_logp_N` is not finite; such tokens stay as context."""
    if batch.all_known:
        return batch
    known_N = batch.rollout_logp_N.isfinite()
    if known_N.all():
        return batch
    per_token = ("rows_N", "targets_N", "advantages_N", "rollout_logp_N", "lengths_N", "sequences_N")
    logps = ("old_logp_N", "ref_logp_N")
    present = {name: values for name in per_token + logps if (values := getattr(batch, name)) is not None}
    return replace(batch, **{name: values[known_N] for name, values in present.items()})
