"""Fixtures of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Qwen3 whose head is not tied to the embedding."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=19,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("untied")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder
