"""An adapter alone in vLLM: pushed under a new id each time, and verified like any push of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("peft")

from or1.config import Config
from or1.core import faults
from or1.core.errors import RunError
from or1.model.load import load_model, load_tokenizer
from or1.rollout import make_engine
from or1.rollout.vllm.local import LocalEngine
from or1.train.engine_check import compare_engine

from .conftest import Side, prompts_of

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module", params=["adapter", pytest.param("merged", marks=pytest.mark.nightly)])
def side(
    request: pytest.FixtureRequest, checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Side]:
    path = checkpoint(True)
    # rslora: the scale must come through the folder. A rank that vLLM has no buffers for.
    lora = {"rank": 5, "alpha": 4, "rslora": True, "push": request.param}
    config = Config.model_validate(
        {
            "run_dir": str(tmp_path_factory.mktemp("run")),
            "model": {"path": str(path), "dtype": "float32", "device": "cpu", "lora": lora},
            "data": {"train": ["made"], "max_prompt_tokens": 32},
            "rollout": {"engine": "vllm", "batch_size": 16},
            "optim": {"max_tokens_per_rank": 8192},
            "stage": [{"steps": 1, "max_response_tokens": 32, "prompts_per_step": 4, "group_size": 4}],
        }
    )
    model, tokenizer = load_model(config.model).train(), load_tokenizer(str(path))
    made = Side(config, model, tokenizer, make_engine(config, model, tokenizer))
    yield made
    made.engine.close()


def change(side: Side, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in side.model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def test_every_push_is_what_vllm_samples_with(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompts = side.engine, prompts_of(4)
    assert isinstance(engine, LocalEngine)

    def drift() -> float:
        return compare_engine(engine, side.model, prompts, side.config).max_abs

    assert drift() < 1e-4, "the first policy is the base"
    for version in (1, 2, 3):
        change(side, version)
        assert drift() > 0.1, "the old adapter"
        engine.update_weights(version)
        assert drift() < 1e-4
    if side.config.model.lora.push == "adapter":
        assert len(engine._llm.llm_engine.list_loras()) == 1
        assert engine._adapter.request.lora_int_id == 4

    # A push that is lost is found by the check of the trainer.
    monkeypatch.setattr(faults, "hit", lambda point: "skip" if point == "push.weights" else None)
    change(side, 4)
    engine.update_weights(4)
    with pytest.raises(RunError, match="disagree after the push of version 4"):
        compare_engine(engine, side.model, prompts, side.config).require()
