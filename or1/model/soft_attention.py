"""Attention with what no kernel of torch has: a soft cap on the scores (Gemma 2), and sinks (GPT-OSS).

Scores are computed as the equation says, for a block of queries at a time, so that memory stays bounded. flash-attn has
a soft cap of its own and is faster.
"""

# S documents of a bucket, L longest of them, K keys, Q query heads, G key-value heads, D head dimension

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Scores that exist at a time where no kernel computes them.
_MAX_SCORES = 1 << 24


@dataclass(frozen=True, eq=False)
class Scores:
    """What becomes of the dot products of queries and keys.

    scale    what they are multiplied by; None: by D ** -0.5
    window   keys that a query sees, itself included; None: all before it
    softcap  scores become softcap * tanh(score / softcap) (Gemma 2)
    sinks_Q  float[Q], scores of a key without a value that every query sees (GPT-OSS)
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks_Q: Tensor | None = None

    @property
    def soft(self) -> bool:
        """Whether there is a soft cap or a sink."""
        return self.softcap is not None or self.sinks_Q is not None


PLAIN = Scores()


def soft_bucket(q_SQLD: Tensor, k_SGLD: Tensor, v_SGLD: Tensor, scores: Scores) -> Tensor:
    """Causal attention of documents of equal length, float[S * L, Q, D].

    A block of queries at a time; backward computes the scores of each block again.
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
    """Attention with a soft cap on its scores and a sink beside the keys, float[S, Q, L, D], as its equation says.

    mask  bool, true where a query sees a key, or float, added to the scores; None: all see all
    """
    repeat = q_SQLD.shape[1] // k_SGKD.shape[1]
    k_SQKD, v_SQKD = (x.repeat_interleave(repeat, dim=1) for x in (k_SGKD, v_SGKD))
    scale = q_SQLD.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    x_SQLK = (q_SQLD @ k_SQKD.transpose(2, 3)) * scale
    x_SQLK = x_SQLK.to(torch.promote_types(x_SQLK.dtype, torch.float32))
    if scores.softcap is not None:
        x_SQLK = scores.softcap * (x_SQLK / scores.softcap).tanh()
    if mask is not None and mask.dtype == torch.bool:
        # Not -inf: the rows of padding on the left see nothing, and would be NaN.
        x_SQLK = x_SQLK.masked_fill(~mask, torch.finfo(x_SQLK.dtype).min)
    elif mask is not None:
        x_SQLK = x_SQLK + mask
    if scores.sinks_Q is not None:
        sinks = scores.sinks_Q.to(x_SQLK.dtype).view(1, -1, 1, 1).expand(*x_SQLK.shape[:3], 1)
        x_SQLK = torch.cat([x_SQLK, sinks], dim=-1)
    weights = x_SQLK.softmax(-1)[..., : k_SQKD.shape[2]]
    return weights.to(v_SQKD.dtype) @ v_SQKD
