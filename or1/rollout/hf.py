"""The embedded engine: transformers' generate on the weights that are being trained."""

# B responses generated together, L response tokens

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from or1.core.types import Prompt, Response
from or1.dist.fsdp import gathered
from or1.model.forward import eval_mode
from or1.model.load import eos_token_ids
from or1.rollout.dealing import Given
from or1.rollout.decode import can_decode, decode
from or1.rollout.engine import Finished, Job, Sampling, Slot, Supply, continued, jobs_of
from or1.rollout.row_sampler import RowSampler, Stopped

__all__ = ["HfEngine", "RowSampler"]


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
        with gathered(self.model), contextlib.suppress(Stopped):
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
        sampler = RowSampler(sampling, [job.seed for job in jobs])
        if not can_decode(self.model):
            return self._cut(jobs, *self._with_transformers(jobs, sampler, left_s))
        with eval_mode(self.model):
            tokens_BL, logp_BL = decode(
                self.model,
                [job.context_ids for job in jobs],
                np.array([job.max_new for job in jobs]),
                sampler,
                self.eos_ids,
                pad_id=self.tokenizer.pad_token_id,
                deadline=time.monotonic() + left_s,
            )
        return self._cut(jobs, tokens_BL, logp_BL)

    def _with_transformers(self, jobs: list[Job], sampler: RowSampler, left_s: float) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens, i64[B, L], and log-probs, f32[B, L], from transformers' `generate`, which serves any model."""
        device = self.model.device
        contexts = [job.context_ids for job in jobs]
        width = max(len(ids) for ids in contexts)
        input_ids = torch.full((len(jobs), width), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(contexts):
            input_ids[row, width - len(ids) :] = torch.as_tensor(ids)
            attention_mask[row, width - len(ids) :] = 1
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
        return sequences[:, width:].cpu().numpy(), sampler.logp_BL().cpu().numpy()

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


@contextmanager
def _plain_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Ignore the checkpoint's generation_config.json, whose top_p or repetition_penalty would bias every sample."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
