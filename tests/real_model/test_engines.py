"""Engine and trainer agree about every token of a pretrained model, before and after weights are changed and pushed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from or1.config import Config
from or1.config.load import load_config
from or1.data import load_eval_sets
from or1.model.load import load_model, load_tokenizer
from or1.rollout import make_engine
from or1.rollout.engine import Engine
from or1.train.engine_check import compare_engine
from tests.helpers.real_model import write_config

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]


def checked(config: Config) -> None:
    """Compare before a change of the weights, and after each of two; the tied head must move with the embedding."""
    tokenizer = load_tokenizer(config.model.path)
    model = load_model(config.model).eval()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    prompts = load_eval_sets(config, tokenizer)["greedy"].prompts
    with opened(make_engine(config, model, tokenizer)) as engine:
        for version in range(3):
            if version:
                with torch.no_grad():
                    # One row of the tied matrix in ten, and a layer: enough to change every log-prob.
                    model.model.embed_tokens.weight[::10] *= 1.05
                    model.model.layers[version].mlp.down_proj.weight *= 1.1
                engine.update_weights(version)
            found = compare_engine(engine, model, prompts, config).require()
            print(
                f"{config.rollout.engine}, {config.model.dtype}, version {version}: {found.tokens} tokens, mean "
                f"{found.mean_abs:.2e}, largest {found.max_abs:.2e} nat, KL {found.kl:.1e}"
            )
            assert found.version == version


@contextmanager
def opened(engine: Engine) -> Iterator[Engine]:
    """Close the engine at the end of the block."""
    try:
        yield engine
    finally:
        engine.close()


def config_for(engine: str, dtype: str, smollm2: Path, folder: Path) -> Config:
    """Return a config with responses of 24 tokens."""
    settings = [f"rollout.engine={engine}", f"model.dtype={dtype}", "stage.0.max_response_tokens=24"]
    return load_config(str(write_config(folder, smollm2)), settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedded_engine(dtype: str, smollm2: Path, tmp_path: Path) -> None:
    checked(config_for("hf", dtype, smollm2, tmp_path))


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm(dtype: str, smollm2: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    checked(config_for("vllm", dtype, smollm2, tmp_path))
