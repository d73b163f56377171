"""A packed row of unlike documents, and attention over its documents by the equation."""

from __future__ import annotations

import torch
from torch import Tensor

from or1.model.attention import Layout
from or1.model.soft_attention import Scores

# Documents of one token, of very unlike lengths, and two that borrow the keys of the third's first five tokens.
Q_LENS = [1, 3, 9, 4, 2, 40]
KEYS = [[0], [1, 2, 3], list(range(4, 13)), [*range(4, 9), *range(13, 17)], [*range(4, 9), 17, 18], list(range(19, 59))]


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def layout_of(shared: bool, device: str = "cpu") -> Layout:
    keys = KEYS if shared else list(torch.arange(sum(Q_LENS)).split(Q_LENS))
    rows = torch.tensor([row for k in keys for row in k], device=device) if shared else None
    k_lens = [len(k) for k in keys]
    cu_q, cu_k = boundaries(Q_LENS).to(device), boundaries(k_lens).to(device)
    return Layout(cu_q=cu_q, cu_k=cu_k, max_q=max(Q_LENS), max_k=max(k_lens), kv_rows_U=rows)


def naive(q_TQD: Tensor, k_TGD: Tensor, v_TGD: Tensor, keys: list[list[int]], window: int | None) -> Tensor:
    repeat, parts, start = q_TQD.shape[1] // k_TGD.shape[1], [], 0
    for length, rows in zip(Q_LENS, keys, strict=True):
        q_LQD = q_TQD[start : start + length]
        k_KQD, v_KQD = (x[torch.as_tensor(rows)].repeat_interleave(repeat, dim=1) for x in (k_TGD, v_TGD))
        scores_QLK = torch.einsum("iqd,jqd->qij", q_LQD, k_KQD) / q_TQD.shape[2] ** 0.5
        at_L, at_K = torch.arange(length)[:, None] + len(rows) - length, torch.arange(len(rows))
        seen_LK = (at_K <= at_L) & (at_K > at_L - (window or len(rows)))
        weights = scores_QLK.masked_fill(~seen_LK.to(q_TQD.device), -torch.inf).softmax(-1)
        parts.append(torch.einsum("qij,jqd->iqd", weights, v_KQD))
        start += length
    return torch.cat(parts)


def soft_naive(q_LQD: Tensor, k_KGD: Tensor, v_KGD: Tensor, window: int | None, extras: Scores) -> Tensor:
    repeat = q_LQD.shape[1] // k_KGD.shape[1]
    k_KQD, v_KQD = (x.repeat_interleave(repeat, dim=1) for x in (k_KGD, v_KGD))
    scores_QLK = torch.einsum("iqd,jqd->qij", q_LQD, k_KQD) / q_LQD.shape[2] ** 0.5
    if extras.softcap:
        scores_QLK = extras.softcap * torch.tanh(scores_QLK / extras.softcap)
    at_L, at_K = torch.arange(len(q_LQD))[:, None] + len(k_KGD) - len(q_LQD), torch.arange(len(k_KGD))
    seen_LK = (at_K <= at_L) & (at_K > at_L - (window or len(k_KGD)))
    weights = scores_QLK.masked_fill(~seen_LK, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if extras.sinks_Q is not None:
        total = total + extras.sinks_Q.exp()[:, None, None]
    return torch.einsum("qij,jqd->iqd", weights / total, v_KQD)
