"""The trainer's state exists before the engine, and what does not fit beside vLLM is refused with the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from or1.config import Config, OptimConfig
from or1.core.errors import EngineError, OptimizerError
from or1.train import build as building
from or1.train.device_room import GpuMemory, require_room, states_fit
from or1.train.optim import MasterAdamW
from tests.helpers.hand_run import config_of, trainer_of

GIB = 2**30
# 2^28 weights in bf16: 0.5 GiB, masters and gradients 1 GiB each, moments 2 GiB.
VALUES = 2**28


def model_of(values: int) -> nn.Module:
    """Return a bf16 model on the meta device, where no memory is needed."""
    return nn.Linear(2**14, values // 2**14, bias=False, dtype=torch.bfloat16, device="meta")


def check(total: float, tmp_path: Path, foreign: float = 0.25, reference: bool = False, **settings: object) -> None:
    optim = {k: v for k, v in settings.items() if k in OptimConfig.model_fields}
    vllm = {k: v for k, v in settings.items() if k in ("gpu_memory", "placement")}
    rollout = {"engine": "vllm", "overlap": settings.get("overlap", False), "vllm": vllm}
    base = config_of(tmp_path)
    config = base.model_copy(update={"rollout": type(base.rollout)(**rollout), "optim": OptimConfig(**optim)})
    assert isinstance(config, Config)
    model = model_of(VALUES)
    optimizer = MasterAdamW(model, config.optim)
    optimizer.reserve()
    other = model_of(VALUES) if reference else None
    require_room(config, model, optimizer, other, GpuMemory(int(total * GIB), int(foreign * GIB)))


def test_states_exist_before_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    make = building.make_engine

    def spy(config, model, tokenizer, world):
        (optimizer,) = found
        seen.append((len(optimizer._reserved), len(optimizer.params)))
        return make(config, model, tokenizer, world)

    found: list[MasterAdamW] = []

    class Noted(MasterAdamW):
        def __init__(self, *args: object):
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(building, "MasterAdamW", Noted)
    monkeypatch.setattr(building, "make_engine", spy)
    trainer_of(config_of(tmp_path))
    ((reserved, params),) = seen
    assert reserved == params > 0


def test_what_fits_is_let_through(tmp_path: Path) -> None:
    # Generation: 0.5 + 1 + 2 + 0.25, and half of 7.75 GiB is 3.875; backward: 4.75 while vLLM sleeps.
    check(7.75, tmp_path, gpu_memory=0.5)
    with pytest.raises(EngineError, match="generation"):
        check(7.4, tmp_path, gpu_memory=0.5)


def test_the_message_has_every_part_and_the_settings_that_lower_it(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as refused:
        check(7.0, tmp_path, gpu_memory=0.5)
    text = str(refused.value)
    assert "the GPU has 7.0 GiB, and generation needs 7.2" in text
    for part in ("weights 0.5", "masters 1.0", "moments 2.0", "CUDA and other processes 0.2", "vLLM 3.5"):
        assert part in text, part
    # 3.25 of 7 GiB are left.
    assert "rollout.vllm.gpu_memory = 0.46 would fit, now 0.5" in text
    assert 'optim.optimizer = "adamw8bit"' in text and 'optim.weights = "stochastic"' in text
    check(7.0, tmp_path, gpu_memory=0.46)


def test_gradients_count_while_the_engine_does_not_sleep(tmp_path: Path) -> None:
    check(7.75, tmp_path, gpu_memory=0.5)
    for awake in ({"overlap": True}, {"placement": "server"}):
        with pytest.raises(EngineError, match=r"backward needs 8\.6: .*gradients 1\.0 \+ vLLM 3\.9"):
            check(7.75, tmp_path, gpu_memory=0.5, **awake)
        check(9.5, tmp_path, gpu_memory=0.5, **awake)


def test_a_trainer_too_large_for_the_gpu_by_itself_is_not_told_to_shrink_vllm(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"backward needs 4\.8") as refused:
        check(4.0, tmp_path, gpu_memory=0.1)
    assert "gpu_memory" not in str(refused.value) and 'optim.grad_dtype = "bfloat16"' in str(refused.value)
    with pytest.raises(EngineError, match=r'backward.*placement = "server"'):
        check(4.5, tmp_path, overlap=True, reference=True, foreign=1.2)


def test_a_reference_model_and_lean_settings_are_counted(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"reference model 0\.5"):
        check(7.75, tmp_path, gpu_memory=0.5, reference=True)
    check(8.5, tmp_path, gpu_memory=0.5, reference=True)
    check(5.5, tmp_path, gpu_memory=0.5, weights="stochastic")


def test_states_that_do_not_fit_are_named_with_remedies() -> None:
    with (
        pytest.raises(OptimizerError, match=r'masters and moments.*"adamw8bit" or "offload"'),
        states_fit(torch.device("cpu")),
    ):
        raise torch.OutOfMemoryError("out of memory")
