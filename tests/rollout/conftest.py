"""Tiny models with room for long prompts, and what a trainer would hand to an engine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from or1.config import Config
from or1.core.types import Prompt, TrainSequence
from or1.dist.oom_retry import RowBudget
from or1.model.load import load_model, load_tokenizer
from or1.rollout import make_engine
from or1.rollout.engine import Engine, Finished, Sampling
from or1.train.rank_rows import Policy
from or1.train.score import with_old_logp

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass
class Side:
    """A trainer's side of an engine, and the engine."""

    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine

    def generate(self, prompts: list[Prompt], **settings: float) -> list[Finished]:
        sampling = Sampling(**({"temperature": 1.0, "max_tokens": 24, "samples": 4, "seed": 5} | settings))
        return sorted(self.engine.generate(prompts, sampling), key=lambda f: (f.prompt, f.sample))

    def drift(self, prompts: list[Prompt], found: list[Finished], temperature: float = 1.0) -> float:
        """Largest |engine - trainer| log-prob, the trainer with its present weights."""
        sequences = [
            TrainSequence(prompts[f.prompt].token_ids, f.response.token_ids, f.response.logp, 0.0) for f in found
        ]
        scored = with_old_logp(Policy(self.model, RowBudget(4096), temperature), sequences)
        return max(float(np.abs(s.old_logp - s.rollout_logp).max()) for s in scored)

    @contextlib.contextmanager
    def endless(self) -> Iterator[None]:
        """Inside, the policy never ends a response by itself."""
        kept = {name: p.clone() for name, p in self.model.named_parameters()}
        with torch.no_grad():
            for embedding in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
                embedding.weight[:, 0] = 4.0
                embedding.weight[self.tokenizer.eos_token_id, 0] = -4.0
        self.engine.update_weights(self.engine.version + 1)
        yield
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(kept[name])
        self.engine.update_weights(self.engine.version + 1)

    def disturb(self, seed: int, scale: float = 0.05) -> None:
        """Change the weights enough that stale weights cannot hide."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.model.parameters():
                p += scale * p.std() * torch.randn(p.shape, generator=generator)


def prompts_of(count: int, length: int = 12, seed: int = 0) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    # The tokenizer names a token more than the model has.
    ids = rng.integers(5, 19, (count, length)).astype(np.int32)
    return [Prompt(f"made:{i}", "made", "", row, ("0",)) for i, row in enumerate(ids)]


@pytest.fixture(scope="session")
def checkpoint(adder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a random checkpoint with the adder's tokenizer, tied or not."""
    made: dict[bool, Path] = {}

    def make(tied: bool) -> Path:
        if tied not in made:
            torch.manual_seed(int(tied))
            config = AutoConfig.from_pretrained(adder)
            config.tie_word_embeddings, config.max_position_embeddings = tied, 16384
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                # Larger than the usual start, so that the policy is far from uniform and old weights show.
                for p in model.parameters():
                    p.copy_(p * 3 if p.ndim > 1 else p)
            made[tied] = tmp_path_factory.mktemp("checkpoint") / ("tied" if tied else "untied")
            model.save_pretrained(made[tied])
            load_tokenizer(str(adder)).save_pretrained(made[tied])
        return made[tied]

    return make


@pytest.fixture(scope="session")
def start(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Side]]:
    """Start an engine for a checkpoint, with what the trainer has beside it; all are closed at the end."""
    started: list[Side] = []

    def begin(
        path: Path, max_response: int = 64, max_prompt: int = 128, *, dtype: str = "float32", **rollout: object
    ) -> Side:
        data = {
            "run_dir": str(tmp_path_factory.mktemp("run")),
            "seed": 1,
            "model": {"path": str(path), "dtype": dtype, "device": "cpu"},
            "data": {"train": ["made"], "max_prompt_tokens": max_prompt},
            "rollout": {"batch_size": 64} | rollout,
            "optim": {"max_tokens_per_rank": 8192},
            "stage": [{"steps": 1, "max_response_tokens": max_response, "prompts_per_step": 4, "group_size": 4}],
        }
        config = Config.model_validate(data)
        model, tokenizer = load_model(config.model).train(), load_tokenizer(str(path))
        started.append(Side(config, model, tokenizer, make_engine(config, model, tokenizer)))
        return started[-1]

    yield begin
    for side in started:
        side.engine.close()
