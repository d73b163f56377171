"""The embedded engine: transformers' generate on the weights that are being trained."""

# B responses generated together, L response tokens, V vocab

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from or1.core.pulse import pulse
from or1.core.types import Prompt, Response
from or1.dist.fsdp import gathered
from or1.model.forward import eval_mode
from or1.model.load import eos_token_ids
from or1.rollout.dealing import Given
from or1.rollout.engine import Finished, Job, Sampling, Slot, Supply, continued, jobs_of

# Probability 1 in the integers that tokens are sampled from; probabilities below 1e-16 round to 0.
_WHOLE = 2.0**52


class HfEngine:
    """Batched generation with transformers, which needs no transfer of weights."""

    shares_weights = True
    continuous_batching = False
    ranks_per_model = 1

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.version = 0
        self.eos_ids = eos_token_ids(model, tokenizer)

    def update_weights(self, version: int) -> None:
        """Set the version of later responses; the weights are the trainer's own."""
        self.version = version

    def release(self) -> None:
        """Do nothing: the engine has no memory of its own."""

    def close(self) -> None:
        """Do nothing: the engine has no processes."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """Yield responses batch by batch, as `Engine.generate`. Collective if the model is sharded."""
        yield from self.generate_from(Given(jobs_of(prompts, sampling, slots)), sampling)

    def generate_from(self, supply: Supply, sampling: Sampling) -> Iterator[Finished]:
        """Yield responses batch by batch, as `TakingEngine.generate_from`. Collective if the model is sharded."""
        deadline = math.inf if sampling.deadline_s is None else time.monotonic() + sampling.deadline_s
        # A rank without jobs takes part too: gathering the weights is collective.
        with gathered(self.model):
            while batch := supply.take(self.batch_size):
                left_s = deadline - time.monotonic()
                if left_s > 0:
                    responses = self._generate_batch(batch, sampling, left_s)
                else:
                    nothing = (np.empty(0, np.int32), np.empty(0, np.float32))
                    responses = [continued(job, *nothing, "deadline", self.version) for job in batch]
                ids = [r.token_ids.tolist() for r in responses]
                texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
                for job, response, text in zip(batch, responses, texts, strict=True):
                    yield Finished(*job.slot, replace(response, text=text))

    def _generate_batch(self, jobs: list[Job], sampling: Sampling, left_s: float) -> list[Response]:
        device = self.model.device
        contexts = [job.context_ids for job in jobs]
        width = max(len(ids) for ids in contexts)
        input_ids = torch.full((len(jobs), width), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(contexts):
            input_ids[row, width - len(ids) :] = torch.as_tensor(ids)
            attention_mask[row, width - len(ids) :] = 1
        sampler = RowSampler(sampling, [job.seed for job in jobs])
        with eval_mode(self.model), _plain_defaults(self.model):
            # transformers' types do not declare that a causal language model has `generate`.
            generate: Any = self.model.generate
            sequences = generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=self._config(max(job.max_new for job in jobs), left_s),
                logits_processor=[sampler],
                # Not the default, which synchronizes ranks at every token: other ranks may have no batch.
                synced_gpus=False,
            )
        tokens_BL = sequences[:, width:]
        return self._cut(jobs, tokens_BL.cpu().numpy(), sampler.logp_BL().float().cpu().numpy())

    def _config(self, max_new: int, left_s: float) -> GenerationConfig:
        # Greedy: RowSampler has already sampled and leaves one possible token.
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new,
            max_time=left_s if math.isfinite(left_s) else None,
            eos_token_id=self.eos_ids,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def _cut(self, jobs: list[Job], tokens_BL: np.ndarray, logp_BL: np.ndarray) -> list[Response]:
        """Return one response per row, cut after the first end-of-sequence token or at the job's limit."""
        is_eos_BL = np.isin(tokens_BL, self.eos_ids)
        end_B = np.where(is_eos_BL.any(axis=1), is_eos_BL.argmax(axis=1) + 1, np.iinfo(np.int64).max)
        responses = []
        for job, tokens, logp, end in zip(jobs, tokens_BL.astype(np.int32), logp_BL, end_B, strict=True):
            length = min(int(end), job.max_new, len(tokens))
            finish = "stop" if length == end else "length" if length == job.max_new else "deadline"
            logp = logp[:length].astype(np.float32)
            responses.append(continued(job, tokens[:length], logp, finish, self.version))
        return responses


class RowSampler(LogitsProcessor):
    """A logits processor that samples the next token of every row with the row's own random numbers.

    sampling  temperature above 0: inverse transform sampling; 0: the likeliest token, with its log-prob at
              temperature 1. top_p and top_k restrict the tokens, but log-probs stay those over the whole vocabulary
    seeds     one per row, so a response does not depend on the other rows of its batch

    All tokens but the sampled one get -inf, so `generate` picks that token. Uses O(B V) memory.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]):
        self.temperature, self.top_p, self.top_k = sampling.temperature, sampling.top_p, sampling.top_k
        self._streams = [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]
        self._logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Sample one token per row, and store its log-probability.

        scores and the result are float[B, V]; the result is 0 for the sampled token and -inf for all others.
        """
        pulse()
        wide_BV = scores.to(torch.promote_types(scores.dtype, torch.float32))
        logp_BV = (wide_BV / (self.temperature or 1.0)).log_softmax(-1)
        token_B1 = self._draw(logp_BV) if self.temperature > 0 else logp_BV.argmax(-1, keepdim=True)
        self._logp.append(logp_BV.gather(1, token_B1)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)

    def logp_BL(self) -> Tensor:
        """Return log-probabilities of the generated tokens, float[B, L], nats; undefined past the end of a sequence."""
        return torch.stack(self._logp, dim=1)

    def _draw(self, logp_BV: Tensor) -> Tensor:
        # Integers: their cumulative sum is the same in any order, while that of floats on a GPU is not deterministic.
        mass_BV = (logp_BV.double().exp() * _WHOLE).round().long()
        if self.top_p < 1 or self.top_k:
            sorted_BV, order_BV = mass_BV.sort(dim=-1, descending=True, stable=True)
            if self.top_k:
                sorted_BV[:, self.top_k :] = 0
            # Keep a token if likelier tokens have less than top_p of the remaining mass; the likeliest is always kept.
            before_BV = sorted_BV.cumsum(-1) - sorted_BV
            beyond_BV = (before_BV >= self.top_p * sorted_BV.sum(-1, keepdim=True)) | (sorted_BV == 0)
            mass_BV = mass_BV.masked_fill(beyond_BV.gather(-1, order_BV.argsort(-1)), 0)
        cdf_BV = mass_BV.cumsum(-1)
        uniform_B = torch.tensor([stream.random() for stream in self._streams], dtype=torch.float64)
        # The first token whose cumulative mass exceeds u times the total; never a token without mass.
        threshold_B1 = (uniform_B[:, None].to(cdf_BV.device) * cdf_BV[:, -1:]).long()
        return (cdf_BV <= threshold_B1).sum(-1, keepdim=True)


@contextmanager
def _plain_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Ignore the checkpoint's generation_config.json, whose top_p or repetition_penalty would bias every sample."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
