"""The embedded engine: transformers' generate on the very weights that are trained."""

# B responses generated together, L response tokens, V vocab

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from or1.fsdp import gathered
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
        # A rank without jobs gathers the weights all the same: the others wait for it.
        with gathered(self.model):
            for start in range(0, len(jobs), self.batch_size):
                batch = jobs[start : start + self.batch_size]
                seeds = [sampling.slot_seed(p, s) for p, s in batch]
                responses = self._generate_batch([prompts[p].token_ids for p, _ in batch], sampling, seeds)
                for (p, s), response in zip(batch, responses, strict=True):
                    yield Finished(p, s, response)

    def _generate_batch(self, prompt_ids: list[np.ndarray], sampling: Sampling, seeds: list[int]) -> list[Response]:
        device = self.model.device
        width = max(len(ids) for ids in prompt_ids)
        input_ids = torch.full((len(prompt_ids), width), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompt_ids):
            input_ids[row, width - len(ids) :] = torch.as_tensor(ids)
            attention_mask[row, width - len(ids) :] = 1
        sampler = RowSampler(sampling.temperature, seeds, sampling.top_p)
        with eval_mode(self.model), _plain_defaults(self.model):
            sequences = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=self._config(sampling),
                logits_processor=[sampler],
            )
        tokens_BL = sequences[:, width:]
        return self._cut(tokens_BL.cpu().numpy(), sampler.logp_BL().float().cpu().numpy())

    def _config(self, sampling: Sampling) -> GenerationConfig:
        # Greedy here: RowSampler has sampled already and leaves one possible token.
        return GenerationConfig(
            do_sample=False,
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


class RowSampler(LogitsProcessor):
    """Samples the next token of every row from random numbers of the row's own, and keeps its log-probability.

    temperature  above 0: sampled by inverting the distribution function; 0: the likeliest token, log-prob at 1
    seeds        one a row, so that what a row becomes does not depend on which rows share its batch
    top_p        sample from the likeliest tokens that hold this much probability; log-probs stay those among all

    It leaves a single possible token to `generate`. O(B V) memory.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], top_p: float = 1.0):
        self.temperature, self.top_p = temperature, top_p
        self._streams = [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]
        self._logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """One generation step."""
        wide_BV = scores.to(torch.promote_types(scores.dtype, torch.float32))
        logp_BV = (wide_BV / (self.temperature or 1.0)).log_softmax(-1)
        token_B1 = self._draw(logp_BV) if self.temperature > 0 else logp_BV.argmax(-1, keepdim=True)
        self._logp.append(logp_BV.gather(1, token_B1)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)

    def logp_BL(self) -> Tensor:
        """float[B, L]: the log-probability of each generated token; past the end of a sequence it means nothing."""
        return torch.stack(self._logp, dim=1)

    def _draw(self, logp_BV: Tensor) -> Tensor:
        p_BV = logp_BV.double().exp()
        if self.top_p < 1:
            sorted_BV, order_BV = p_BV.sort(-1, descending=True)
            # A token stays if those before it hold less than top_p; the likeliest one always does.
            beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= self.top_p
            p_BV = p_BV.masked_fill(beyond_BV.gather(-1, order_BV.argsort(-1)), 0.0)
        cdf_BV = p_BV.cumsum(-1)
        uniform_B = torch.tensor([stream.random() for stream in self._streams], dtype=torch.float64)
        # The first token whose cumulated probability is above u; a token of probability 0 never is.
        threshold_B1 = uniform_B[:, None].to(cdf_BV.device) * cdf_BV[:, -1:]
        return (cdf_BV <= threshold_B1).sum(-1, keepdim=True)


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
