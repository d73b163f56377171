"""Engine and trainer agree about every token of a pretrained model, before and after weights are changed and pushed.

In bf16 all round, so all are compared with fp32: engine and trainer may be twice as far from it as transformers.
"""

# N tokens of all responses

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from or1.config import Config
from or1.config.load import load_config
from or1.core.types import TrainSequence
from or1.data import load_eval_sets
from or1.dist.oom_retry import RowBudget
from or1.model.load import load_model, load_tokenizer
from or1.rollout import make_engine
from or1.rollout.engine import Engine, Sampling
from or1.train.engine_check import LIMIT_FP32
from or1.train.rank_rows import Policy
from or1.train.score import score
from tests.helpers.plain_logp import plain_logp
from tests.helpers.real_model import write_config

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]


def checked(config: Config) -> None:
    """Compare before a change of the weights, and after each of two; the tied head must move with the embedding."""
    tokenizer = load_tokenizer(config.model.path)
    model = load_model(config.model).eval()
    exact = load_model(config.model.model_copy(update={"dtype": "float32"})).eval()
    plain = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=getattr(torch, config.model.dtype))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    prompts = load_eval_sets(config, tokenizer)["greedy"].prompts[:4]
    before: list[TrainSequence] = []
    with opened(make_engine(config, model, tokenizer)) as engine:
        for version in range(3):
            if version:
                change(model, version)
                engine.update_weights(version)
                assert engine.version == version
                # What was sampled before the push is no longer what the policy says.
                stale = np.concatenate(scores(model, before)) - np.concatenate([s.rollout_logp for s in before])
                print(f"before push {version}: {np.abs(stale).mean():.2e} nat apart on average")
                assert np.abs(stale).mean() > 0.1
            found = engine.generate(prompts, Sampling(1.0, config.stage[0].max_response_tokens, 2, seed=version))
            before = [
                TrainSequence(prompts[f.prompt].token_ids, f.response.token_ids, f.response.logp, 0.0) for f in found
            ]
            copy_weights(model, exact)
            copy_weights(model, plain)
            sides = {
                "engine": np.concatenate([s.rollout_logp for s in before]).astype(np.float64),
                "trainer": np.concatenate(scores(model, before)).astype(np.float64),
                "transformers": plain_logp(plain, before).numpy(),
            }
            compare(config, version, sides, np.concatenate(scores(exact, before)))


def change(model: PreTrainedModel, version: int) -> None:
    """Change one row of the tied matrix in ten, and a layer: enough to change every log-prob."""
    with torch.no_grad():
        model.model.embed_tokens.weight[::10] *= 1.05
        model.model.layers[version].mlp.down_proj.weight *= 1.1


def copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    with torch.no_grad():
        for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
            ours.copy_(theirs)


def scores(model: PreTrainedModel, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
    """Return the trainer's log-probs, float[L] a sequence."""
    return score(Policy(model, RowBudget(1024), 1.0), sequences)


def compare(config: Config, version: int, sides: dict[str, np.ndarray], exact_N: np.ndarray) -> None:
    """Print and check the distances of the log-probs of engine, trainer and plain transformers, and from fp32."""
    apart_N = np.abs(sides["engine"] - sides["trainer"])
    off = {name: float(np.abs(logp_N - exact_N).mean()) for name, logp_N in sides.items()}
    print(
        f"{config.rollout.engine}, {config.model.dtype}, version {version}: {len(apart_N)} tokens, engine and trainer "
        f"{apart_N.mean():.2e} apart on average, {apart_N.max():.2e} nat at most; from the trainer in fp32 on average: "
        + ", ".join(f"{name} {value:.2e}" for name, value in off.items())
    )
    if config.model.dtype == "float32":
        assert apart_N.max() < LIMIT_FP32
    else:
        assert max(off["engine"], off["trainer"]) <= 2 * off["transformers"]


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
