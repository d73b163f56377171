"""The embedded engine as it was: transformers' `generate`, and integers over the whole vocabulary for each draw."""

# B rows, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from or1.core.types import Response
from or1.rollout.engine import Job, Sampling
from or1.rollout.hf import HfEngine
from or1.rollout.row_sampler import RowSampler


class FullDraw(RowSampler):
    """Inverse transform sampling with one cumulative sum over the whole vocabulary, in i64[B, V]."""

    def sample(self, logits_BV: Tensor, rows: range) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the next tokens, i64[B], and their log-probs, f32[B], nats."""
        logp_BV = (logits_BV.float() / (self.temperature or 1.0)).log_softmax(-1)
        token_B1 = logp_BV.argmax(-1, keepdim=True)
        if self.temperature > 0:
            mass_BV = (logp_BV.double().exp() * 2.0**52).round().long()
            if self.top_p < 1 or self.top_k:
                mass_BV = self._restricted(mass_BV)
            cdf_BV = mass_BV.cumsum(-1)
            uniform_B = torch.tensor([self._streams[row].random() for row in rows], dtype=torch.float64)
            token_B1 = (cdf_BV <= (uniform_B[:, None] * cdf_BV[:, -1:]).long()).sum(-1, keepdim=True)
        return token_B1[:, 0], logp_BV.gather(1, token_B1)[:, 0]


class FormerEngine(HfEngine):
    """Every sample has its own prefill, the cache is copied for every token, and no row leaves the batch."""

    def _generate_batch(self, jobs: list[Job], sampling: Sampling, left_s: float) -> list[Response]:
        sampler = FullDraw(sampling, [job.seed for job in jobs])
        return self._cut(jobs, *self._with_transformers(jobs, sampler, left_s))
