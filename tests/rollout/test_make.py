"""An engine that is slow without need is named at the start, in a dry run and by `or1 doctor`."""

from __future__ import annotations

import pytest
import torch

from or1.config import Config
from or1.config.load import load_config
from or1.rollout import make
from or1.rollout.make import engine_warnings

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def config(engine: str, limit: int = 24) -> Config:
    found = load_config("examples/quickstart.toml", [f"rollout.engine={engine}"])
    longer = [stage.model_copy(update={"max_response_tokens": limit}) for stage in found.stage]
    # Not from the file: its model has fewer positions.
    return found.model_copy(update={"stage": tuple(longer)})


@pytest.mark.parametrize(
    ("engine", "device", "version", "limit", "words"),
    [
        ("auto", GPU, None, 24, ["vLLM is not installed"]),
        ("auto", GPU, "0.99.0", 24, ["vLLM 0.99.0 is not a tested version"]),
        ("auto", GPU, None, 2049, ["vLLM is not installed", "responses of up to 2,049 tokens"]),
        ("auto", GPU, "0.32.1", 32768, []),
        ("hf", GPU, "0.32.1", 2048, []),
        ("hf", CPU, None, 2049, ["responses of up to 2,049 tokens"]),
        ("auto", CPU, None, 24, []),
        ("vllm", CPU, "0.32.1", 32768, []),
    ],
)
def test_warnings_name_the_engine_and_the_remedy(
    engine: str,
    device: torch.device,
    version: str | None,
    limit: int,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(make, "installed_vllm", lambda: version)
    found = engine_warnings(config(engine, limit), device)
    assert len(found) == len(words)
    for line, word in zip(found, words, strict=True):
        assert line.startswith("WARNING: ") and word in line and 'rollout.engine = "vllm"' in line
