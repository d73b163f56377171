"""Sequences -> packed rows: several documents in one row, each attending only to itself.

A sequence is its prompt and all but the last token of its response: the last token is predicted but predicts nothing.
"""

# T packed tokens of a row, S documents of a row, N trained tokens of a row

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from or1.balance import plan_rows


@dataclass(frozen=True)
class TrainSequence:
    """One response to train on: `prompt_ids` i32[Lp], `response_ids` i32[L], `rollout_logp` f32[L], its advantage.

    `old_logp` float[L] is what the ratio compares with; None when the update is on-policy.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    rollout_logp: np.ndarray
    advantage: float
    old_logp: np.ndarray | None = None

    @property
    def packed_tokens(self) -> int:
        """Tokens this sequence takes in a packed row."""
        return len(self.prompt_ids) + len(self.response_ids) - 1

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss sums over."""
        return len(self.response_ids)


@dataclass(frozen=True)
class Microbatch:
    """One packed row on the device.

    ids_T, positions_T  i64[T]; positions restart at 0 in every document
    cu_seqlens          i32[S+1], document boundaries
    rows_N              i64[N], packed positions whose hidden state predicts a trained token
    targets_N           i64[N], those tokens
    advantages_N        float[N]
    rollout_logp_N      float[N], the engine's log-probabilities
    old_logp_N          float[N], or None when on-policy
    """

    ids_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    rows_N: Tensor
    targets_N: Tensor
    advantages_N: Tensor
    rollout_logp_N: Tensor
    old_logp_N: Tensor | None = None


def pack(
    sequences: Sequence[TrainSequence],
    max_tokens: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Microbatch]:
    """Best-fit packed rows of at most `max_tokens` tokens, their floats in `dtype`.

    Every sequence is in exactly one row, whole. Raises ValueError if a sequence is longer than `max_tokens`.
    """
    return [batch for _, batch in pack_indexed(sequences, max_tokens, device, dtype)]


def pack_indexed(
    sequences: Sequence[TrainSequence],
    max_tokens: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[list[int], Microbatch]]:
    """As `pack`, each row with the indices of its sequences in the order in which they stand in it."""
    rows = plan_rows([s.packed_tokens for s in sequences], max_tokens)
    return zip(rows, pack_rows(sequences, rows, device, dtype), strict=True)


def pack_rows(
    sequences: Sequence[TrainSequence],
    rows: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Microbatch]:
    """Rows of a plan (one rank's share of `balance.plan_ranks`): the sequences of each, in the order given.

    A row without sequences is an anchor, one token that nothing is trained on: its loss is 0 and its backward makes
    the same collective calls as any other row's.
    """
    for indices in rows:
        yield _to_microbatch([sequences[i] for i in indices], device, dtype) if indices else _anchor(device, dtype)


def _anchor(device: torch.device | str, float_dtype: torch.dtype) -> Microbatch:
    token, nothing = torch.zeros(1, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int64, device=device)
    floats = torch.empty(0, dtype=float_dtype, device=device)
    bounds = torch.tensor([0, 1], dtype=torch.int32, device=device)
    return Microbatch(token, token, bounds, 1, nothing, nothing, floats, floats)


def _to_microbatch(
    sequences: Sequence[TrainSequence], device: torch.device | str, float_dtype: torch.dtype
) -> Microbatch:
    lengths_S = np.array([s.packed_tokens for s in sequences])
    ends_S = np.cumsum(lengths_S)
    starts_S = ends_S - lengths_S
    ids = np.concatenate([part for s in sequences for part in (s.prompt_ids, s.response_ids[:-1])])
    positions = np.concatenate([np.arange(n) for n in lengths_S])
    # The hidden state at the prompt's last token predicts the response's first token.
    rows = np.concatenate([np.arange(end - s.trained_tokens, end) for s, end in zip(sequences, ends_S, strict=True)])
    advantages = np.repeat([s.advantage for s in sequences], [s.trained_tokens for s in sequences])

    def to_device(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(array, dtype=dtype).to(device)

    old = [s.old_logp for s in sequences if s.old_logp is not None]
    if old and len(old) != len(sequences):
        raise ValueError(f"{len(old)} of {len(sequences)} sequences have old_logp; give it to all or to none")
    return Microbatch(
        ids_T=to_device(ids, torch.int64),
        positions_T=to_device(positions, torch.int64),
        cu_seqlens=to_device(np.append(starts_S, ends_S[-1]), torch.int32),
        max_seqlen=int(lengths_S.max()),
        rows_N=to_device(rows, torch.int64),
        targets_N=to_device(np.concatenate([s.response_ids for s in sequences]), torch.int64),
        advantages_N=to_device(advantages, float_dtype),
        rollout_logp_N=to_device(np.concatenate([s.rollout_logp for s in sequences]), float_dtype),
        old_logp_N=to_device(np.concatenate(old), float_dtype) if old else None,
    )
