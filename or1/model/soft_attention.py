"""Attention with a soft cap on the scores (Gemma 2) or sinks (GPT-OSS), which no attention kernel of torch supports.

Scores are materialized for a block of queries at a time, so memory is bounded. flash-attn computes soft caps itself,
and flash-attn 4 sinks too; both are faster.
"""

# S documents of a bucket, L longest of them, K keys, Q query heads, G key-value heads, D head dimension

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Most scores (query-key pairs times heads) in memory at a time.
_MAX_SCORES = 1 << 24


@dataclass(frozen=True, eq=False)
class Scores:
    """Settings that turn dot products of queries and keys into attention scores.

    scale    factor of the dot products; None: D ** -0.5
    window   number of keys that a query attends to, itself included; None: all keys up to the query
    softcap  scores become softcap * tanh(score / softcap) (Gemma 2)
    sinks_Q  float[Q], score of a virtual key without a value that every query attends to (GPT-OSS)
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks_Q: Tensor | None = None

    @property
    def soft(self) -> bool:
        """True if there is a soft cap or a sink."""
        return self.softcap is not None or self.sinks_Q is not None


PLAIN = Scores()


def soft_bucket(q_SQLD: Tensor, k_SGLD: Tensor, v_SGLD: Tensor, scores: Scores) -> Tensor:
    """Return causal attention of documents of equal length, float[S * L, Q, D].

    Computes one block of queries at a time; backward recomputes the scores of each block.
    """
    window = scores.window
    length, heads = q_SQLD.shape[2], q_SQLD.shape[0] * q_SQLD.shape[1]
    step = max(1, _MAX_SCORES // (heads * length))
    parts = []
    for start in range(0, length, step):
        end = min(start + step, length)
        first = 0 if window is None else max(0, start + 1 - window)
        at_q, at_k = (torch.arange(a, end, device=q_SQLD.device) for a in (start, first))
        back = at_q[:, None] - at_k
        mask = back >= 0 if window is None else (back >= 0) & (back < window)
        block = (q_SQLD[:, :, start:end], k_SGLD[:, :, first:end], v_SGLD[:, :, first:end], mask, scores)
        parts.append(
            checkpoint(soft_attention, *block, use_reentrant=False) if step < length else soft_attention(*block)
        )
    return torch.cat(parts, dim=2).transpose(1, 2).flatten(0, 1)


def soft_attention(q_SQLD: Tensor, k_SGKD: Tensor, v_SGKD: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Return attention with the soft cap and the sink of `scores`, float[S, Q, L, D].

    mask  bool, true where a query attends to a key, or float, added to the scores; None: no mask
    """
    repeat = q_SQLD.shape[1] // k_SGKD.shape[1]
    k_SQKD, v_SQKD = (x.repeat_interleave(repeat, dim=1) for x in (k_SGKD, v_SGKD))
    scale = q_SQLD.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    x_SQLK = (q_SQLD @ k_SQKD.transpose(2, 3)) * scale
    x_SQLK = x_SQLK.to(torch.promote_types(x_SQLK.dtype, torch.float32))
    if scores.softcap is not None:
        x_SQLK = scores.softcap * (x_SQLK / scores.softcap).tanh()
    if mask is not None and mask.dtype == torch.bool:
        # Not -inf: left-padded rows attend to no key, so their softmax would be NaN.
        x_SQLK = x_SQLK.masked_fill(~mask, torch.finfo(x_SQLK.dtype).min)
    elif mask is not None:
        x_SQLK = x_SQLK + mask
    if scores.sinks_Q is not None:
        sinks = scores.sinks_Q.to(x_SQLK.dtype).view(1, -1, 1, 1).expand(*x_SQLK.shape[:3], 1)
        x_SQLK = torch.cat([x_SQLK, sinks], dim=-1)
    weights = x_SQLK.softmax(-1)[..., : k_SQKD.shape[2]]
    return weights.to(v_SQKD.dtype) @ v_SQKD
