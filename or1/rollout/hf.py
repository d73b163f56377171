"""The embedded engine: transformers' generate on the very weights that are trained."""

# B responses generated together, L response tokens, V vocab

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from or1.model import eval_mode
from or1.rollout.base import Finished, Sampling
from or1.types import Prompt, Response


class HfEngine:
    """Batched generation with the log-probability of every sampled token; needs no weight transfer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.version = 0
        self.eos_ids = _eos_ids(model, tokenizer)

    def update_weights(self, version: int) -> None:
        """Stamp responses with `version` from now on; the weights are the trainer's own."""
        self.version = version

    def close(self) -> None:
        """See `Engine.close`; there is nothing to end."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Finished]:
        """Yield responses batch by batch; see `Engine.generate`."""
        jobs = [(p, s) for p in range(len(prompts)) for s in range(sampling.samples)]
        for start in range(0, len(jobs), self.batch_size):
            batch = jobs[start : start + self.batch_size]
            seed = int(np.random.SeedSequence([sampling.seed, start]).generate_state(1, np.uint64)[0] >> 1)
            responses = self._generate_batch([prompts[p].token_ids for p, _ in batch], sampling, seed)
            for (p, s), response in zip(batch, responses, strict=True):
                yield Finished(p, s, response)

    def _generate_batch(self, prompt_ids: list[np.ndarray], sampling: Sampling, seed: int) -> list[Response]:
        device = self.model.device
        width = max(len(ids) for ids in prompt_ids)
        input_ids = torch.full((len(prompt_ids), width), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompt_ids):
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
                generation_config=self._config(sampling),
                logits_processor=[recorder],
            )
        tokens_BL = sequences[:, width:]
        logp_BL = recorder.finish(tokens_BL)
        return self._cut(tokens_BL.cpu().numpy(), logp_BL.float().cpu().numpy())

    def _config(self, sampling: Sampling) -> GenerationConfig:
        # Temperature 1 here: the recorder divides by the temperature itself, so that it sees what is sampled from.
        return GenerationConfig(
            do_sample=sampling.temperature > 0,
            temperature=1.0,
            top_k=0,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def _cut(self, tokens_BL: np.ndarray, logp_BL: np.ndarray) -> list[Response]:
        """End each row after its first end-of-sequence token."""
        is_eos_BL = np.isin(tokens_BL, self.eos_ids)
        stopped_B = is_eos_BL.any(axis=1)
        length_B = np.where(stopped_B, is_eos_BL.argmax(axis=1) + 1, tokens_BL.shape[1])
        token_ids = [tokens[:n].astype(np.int32) for tokens, n in zip(tokens_BL, length_B, strict=True)]
        texts = self.tokenizer.batch_decode([ids.tolist() for ids in token_ids], skip_special_tokens=True)
        return [
            Response(ids, logp[: len(ids)].astype(np.float32), "stop" if stopped else "length", self.version, text)
            for ids, logp, stopped, text in zip(token_ids, logp_BL, stopped_B, texts, strict=True)
        ]


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


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [tokenizer.eos_token_id, *listed] if i is not None})
