"""Generation engines: what samples responses, and with which weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from or1.config import Config
    from or1.rollout.base import Engine


def make_engine(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """The engine of `[rollout]`."""
    from or1.rollout.hf import HfEngine

    return HfEngine(model, tokenizer, config.rollout.batch_size)
