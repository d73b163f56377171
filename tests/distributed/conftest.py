"""Makes the helpers of these tests importable, here and in the processes they start."""

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1]):
    sys.path.insert(0, str(folder))

import pytest  # noqa: E402
import torch  # noqa: E402
from rank_processes import stop_server  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _no_server_left():
    yield
    stop_server()


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 whose head is a weight of its own."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=19, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    folder = tmp_path_factory.mktemp("untied")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder
