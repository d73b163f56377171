"""One rank reads the model, all get its bits, and none but that one ever has it whole."""

from __future__ import annotations

from pathlib import Path

import dist_work
import numpy as np
import pytest
from rank_processes import run_ranks
from transformers import Qwen3Config, Qwen3ForCausalLM

from or1.config import ModelConfig
from or1.model import load_model


@pytest.mark.parametrize(("size", "dtype", "name"), [
    (2, "float32", "adder"), pytest.param(4, "bfloat16", "untied", marks=pytest.mark.slow),
    pytest.param(2, "float64", "untied", marks=pytest.mark.slow),
])  # fmt: skip
def test_every_rank_has_the_bits_of_the_checkpoint(
    size: int, dtype: str, name: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(name)
    model = load_model(ModelConfig(path=str(path), dtype=dtype, device="cpu"))
    want = {n: dist_work.whole(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    assert any("inv_freq" in name for name in want)
    for found in run_ranks(dist_work.loaded, size, path, dtype):
        assert found.keys() == want.keys()
        assert all(np.array_equal(found[n], value) for n, value in want.items())


@pytest.mark.slow
def test_only_the_main_rank_ever_has_the_whole_model_in_memory(tmp_path: Path) -> None:
    config = Qwen3Config(vocab_size=4000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, head_dim=128,
                         num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)  # fmt: skip
    model = Qwen3ForCausalLM(config)
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    main, *others = run_ranks(dist_work.memory_of_loading, 4, tmp_path)
    print(f"the model has {size / 2**20:.0f} MiB; loading takes {main / 2**20:.0f} on the main rank and "
          f"{max(others) / 2**20:.0f} on the others")  # fmt: skip
    assert main > size
    # Their shard is a quarter.
    assert max(others) < 0.6 * size
