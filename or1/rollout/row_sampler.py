"""Sampling of the next tokens, each row with its own random numbers."""

# B rows, V vocabulary, C chunks of a row, K tokens of a chunk, L response tokens

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from or1.core import faults
from or1.core.pulse import pulse
from or1.rollout.engine import Sampling

# Probability 1 in the integers that tokens are sampled from; probabilities below 1e-16 round to 0.
_WHOLE = 2.0**52
_CHUNK = 256
# On a CPU, log-probs and masses of so many tokens stay in a core's cache; fresh memory costs more than the arithmetic.
_BLOCK_TOKENS = 2**18


class Stopped(Exception):
    """`Sampling.stop` returned True: the batch is given up, since its unfinished rows cannot continue bit by bit."""


class RowSampler(LogitsProcessor):
    """Samples the next token of every row with the row's own random numbers.

    sampling  temperature above 0: inverse transform sampling; 0: the likeliest token, with its log-prob at
              temperature 1. top_p and top_k restrict the tokens, but log-probs stay those over the whole vocabulary
    seeds     one per row, so a response does not depend on the other rows of its batch

    Also a logits processor: all tokens but the sampled one get -inf, so `generate` picks that token. Uses O(B V)
    memory on a GPU, O(V) on a CPU.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]):
        self.temperature, self.top_p, self.top_k = sampling.temperature, sampling.top_p, sampling.top_k
        self._stop = sampling.stop
        self._streams = [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]
        self._logp: list[Tensor] = []
        self._mass = torch.empty(0, dtype=torch.float64)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Sample one token per row, and store its log-probability.

        scores and the result are float[B, V]; the result is 0 for the sampled token and -inf for all others.
        """
        token_B, logp_B = self.sample(scores, range(len(scores)))
        self._logp.append(logp_B)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)

    def logp_BL(self) -> Tensor:
        """Return log-probs of the tokens that `generate` took, f32[B, L], nats; undefined past a sequence's end."""
        return torch.stack(self._logp, dim=1)

    def sample(self, logits_BV: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the next tokens, i64[B], and their log-probs, f32[B], nats.

        logits_BV  float[B, V]
        rows       for each row of logits, the index of its seed

        Raises Stopped.
        """
        faults.hit("rollout.token")
        pulse()
        if self._stop():
            raise Stopped
        uniform_B = torch.zeros(len(rows), dtype=torch.float64)
        if self.temperature > 0:
            uniform_B = torch.tensor([self._streams[row].random() for row in rows], dtype=torch.float64)
        uniform_B = uniform_B.to(logits_BV.device)
        size = max(1, _BLOCK_TOKENS // logits_BV.shape[1]) if logits_BV.device.type == "cpu" else len(rows)
        blocks = zip(logits_BV.split(size), uniform_B.split(size), strict=True)
        tokens, logps = zip(*(self._sample_block(*block) for block in blocks), strict=True)
        return torch.cat(tokens), torch.cat(logps)

    def _sample_block(self, logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        wide_BV = logits_BV.float()
        if self.temperature not in (0, 1):
            wide_BV = wide_BV / self.temperature
        logp_BV = wide_BV.log_softmax(-1)
        token_B1 = self._draw(logp_BV, uniform_B[:, None]) if self.temperature > 0 else logp_BV.argmax(-1, keepdim=True)
        return token_B1[:, 0], logp_BV.gather(1, token_B1)[:, 0]

    def _draw(self, logp_BV: Tensor, uniform_B1: Tensor) -> Tensor:
        """Return the first token whose cumulative mass exceeds u times the total, i64[B, 1]; never one without mass."""
        # The masses are integers, and their sum is below 2^53. So sums in fp64 are exact, the same in any order, while
        # those of fractions are not deterministic on a GPU. A row's chunks are summed first, then one chunk's tokens.
        mass_BCK = self._masses(logp_BV)
        sum_BC = mass_BCK.sum(-1)
        cdf_BC = sum_BC.cumsum(-1)
        threshold_B1 = (uniform_B1 * cdf_BC[:, -1:]).floor()
        chunk_B1 = (cdf_BC <= threshold_B1).sum(-1, keepdim=True)
        before_B1 = cdf_BC.gather(1, chunk_B1) - sum_BC.gather(1, chunk_B1)
        size = mass_BCK.shape[2]
        mass_BK = mass_BCK.gather(1, chunk_B1[:, :, None].expand(-1, -1, size))[:, 0]
        cdf_BK = mass_BK.cumsum(-1) + before_B1
        return chunk_B1 * size + (cdf_BK <= threshold_B1).sum(-1, keepdim=True)

    def _masses(self, logp_BV: Tensor) -> Tensor:
        """Return probabilities as whole numbers of 1 / _WHOLE, f64[B, C, K]; tokens past the vocabulary have mass 0."""
        rows, vocab = logp_BV.shape
        size = min(_CHUNK, vocab)
        padded = -(-vocab // size) * size
        if self._mass.shape != (rows, padded) or self._mass.device != logp_BV.device:
            self._mass = logp_BV.new_zeros(rows, padded, dtype=torch.float64)
        mass_BV = self._mass[:, :vocab]
        mass_BV.copy_(logp_BV).exp_().mul_(_WHOLE).round_()
        if self.top_p < 1 or self.top_k:
            mass_BV.copy_(self._restricted(mass_BV.long()))
        return self._mass.view(rows, -1, size)

    def _restricted(self, mass_BV: Tensor) -> Tensor:
        """Return the masses, i64[B, V], with 0 for tokens that top_p and top_k rule out."""
        sorted_BV, order_BV = mass_BV.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            sorted_BV[:, self.top_k :] = 0
        # Keep a token if likelier tokens have less than top_p of the remaining mass; the likeliest is always kept.
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        beyond_BV = (before_BV >= self.top_p * sorted_BV.sum(-1, keepdim=True)) | (sorted_BV == 0)
        return mass_BV.masked_fill(beyond_BV.gather(-1, order_BV.argsort(-1)), 0)
