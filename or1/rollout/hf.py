"""The embedded engine: transformers' generate on the very weights that are trained."""

# B responses generated together, L response tokens, V vocab

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from or1.model import eos_token_ids, eval_mode
from or1.rollout.base import Finished, Job, Sampling, Slot, continued, jobs_of
from or1.types import Prompt, Response


class HfEngine:
    """Batched generation with the log-probability of every sampled token; needs no weight transfer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.version = 0
        self.eos_ids = eos_token_ids(model, tokenizer)

    def update_weights(self, version: int) -> None:
        """Stamp responses with `version` from now on; the weights are the trainer's own."""
        self.version = version

    def release(self) -> None:
        """See `Engine.release`; there is nothing to free."""

    def close(self) -> None:
        """See `Engine.close`; there is nothing to end."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, begun: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """Yield responses batch by batch; see `Engine.generate`."""
        jobs = list(jobs_of(prompts, sampling, begun))
        deadline = math.inf if sampling.deadline_s is None else time.monotonic() + sampling.deadline_s
        for start in range(0, len(jobs), self.batch_size):
            batch = jobs[start : start + self.batch_size]
            seed = int(np.random.SeedSequence([sampling.seed, start]).generate_state(1, np.uint64)[0] >> 1)
            left_s = deadline - time.monotonic()
            if left_s > 0:
                responses = self._generate_batch(batch, sampling, seed, left_s)
            else:
                nothing = (np.empty(0, np.int32), np.empty(0, np.float32))
                responses = [continued(job, *nothing, "deadline", self.version) for job in batch]
            texts = self.tokenizer.batch_decode([r.token_ids.tolist() for r in responses], skip_special_tokens=True)
            for job, response, text in zip(batch, responses, texts, strict=True):
                yield Finished(*job.slot, replace(response, text=text))

    def _generate_batch(self, jobs: list[Job], sampling: Sampling, seed: int, left_s: float) -> list[Response]:
        device = self.model.device
        contexts = [job.context_ids for job in jobs]
        width = max(len(ids) for ids in contexts)
        input_ids = torch.full((len(jobs), width), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(contexts):
            input_ids[row, width - len(ids) :] = torch.as_tensor(ids)
            attention_mask[row, width - len(ids) :] = 1
        recorder = LogprobRecorder(sampling.temperature or 1.0)
        devices = [device] if device.type == "cuda" else []
        # The seed belongs to this call alone: what ran before it must not change what it samples.
        with torch.random.fork_rng(devices=devices), eval_mode(self.model), _plain_defaults(self.model):
            torch.manual_seed(seed)
            sequences = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=self._config(sampling, max(job.max_new for job in jobs), left_s),
                logits_processor=[recorder],
            )
        tokens_BL = sequences[:, width:]
        logp_BL = recorder.finish(tokens_BL)
        return self._cut(jobs, tokens_BL.cpu().numpy(), logp_BL.float().cpu().numpy())

    def _config(self, sampling: Sampling, max_new: int, left_s: float) -> GenerationConfig:
        # Temperature 1 here: the recorder divides by the temperature itself, so that it sees what is sampled from.
        return GenerationConfig(
            do_sample=sampling.temperature > 0,
            temperature=1.0,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_new_tokens=max_new,
            max_time=left_s if math.isfinite(left_s) else None,
            eos_token_id=self.eos_ids,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def _cut(self, jobs: list[Job], tokens_BL: np.ndarray, logp_BL: np.ndarray) -> list[Response]:
        """End each row after its first end-of-sequence token, or at its job's own limit."""
        is_eos_BL = np.isin(tokens_BL, self.eos_ids)
        end_B = np.where(is_eos_BL.any(axis=1), is_eos_BL.argmax(axis=1) + 1, np.iinfo(np.int64).max)
        responses = []
        for job, tokens, logp, end in zip(jobs, tokens_BL.astype(np.int32), logp_BL, end_B, strict=True):
            length = min(int(end), job.max_new, len(tokens))
            finish = "stop" if length == end else "length" if length == job.max_new else "deadline"
            logp = logp[:length].astype(np.float32)
            responses.append(continued(job, tokens[:length], logp, finish, self.version))
        return responses


class LogprobRecorder(LogitsProcessor):
    """Scales logits by 1 / temperature and keeps the log-probability of what is then sampled, in O(B V) memory.

    It sees the scores of a token before it is sampled and the token itself one call later.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self._columns: list[Tensor] = []
        self._pending_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """One generation step."""
        self._settle(input_ids[:, -1])
        scaled_BV = scores.to(torch.promote_types(scores.dtype, torch.float32)) / self.temperature
        self._pending_BV = scaled_BV.log_softmax(-1)
        return scaled_BV

    def finish(self, tokens_BL: Tensor) -> Tensor:
        """float[B, L]: the log-probability of each generated token; past the end of a sequence it means nothing."""
        self._settle(tokens_BL[:, -1])
        return torch.stack(self._columns, dim=1)

    def _settle(self, token_B: Tensor) -> None:
        if self._pending_BV is not None:
            self._columns.append(self._pending_BV.gather(1, token_B[:, None])[:, 0])


@contextmanager
def _plain_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Hide the checkpoint's generation_config.json: its top_p or repetition_penalty would bias every sample."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
