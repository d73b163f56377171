"""`[model.lora]`: what is refused, what a resumed run may change, and what needs neither PEFT nor a GPU to know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from or1.config import LoraConfig, ModelConfig
from or1.config.changes import changed_keys, fixed_keys
from or1.config.load import load_config
from or1.core.errors import ConfigError, ModelError, RunError
from or1.model.lora.base import base_fingerprint
from or1.model.lora.quantize import quantization_options
from or1.rollout.vllm.adapter_push import adapter_options
from or1.run.base_weights import BASE, base_input, require_base


@pytest.fixture(autouse=True)
def _from_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def load(*overrides: str):
    return load_config("examples/quickstart.toml", ["model.lora.rank=8", *overrides])


@pytest.mark.parametrize(
    ("override", "where", "reason"),
    [
        ("model.lora.dropout=0.1", "model.lora.dropout", "policy that sampled"),
        ('model.lora.targets=["q_proj", "lm_head"]', "model.lora.targets", "third product of the head"),
        ("model.lora.targets=model.embed_tokens", "model.lora.targets", "unties a tied head"),
        ('model.lora.targets=["all-linear", "q_proj"]', "model.lora.targets", "name it alone"),
        ("model.lora.targets=[]", "model.lora.targets", "name at least one"),
        ("model.lora.rank=0", "model.lora.rank", "greater than or equal to 1"),
        ("model.lora.push=adapter", "model.lora.push", 'no effect with rollout.engine = "hf"'),
        ("optim.weights=stochastic", "optim.weights", "adapters are kept in fp32"),
        ("model.lora.quantize=nf4", "model.lora.quantize", "needs a GPU"),
        ("model.lora.r=4", "model.lora.r", "Known keys"),
    ],
)
def test_what_cannot_be_had_is_refused_with_a_reason(override: str, where: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("rollout.engine=hf", "model.device=cpu", "model.dtype=bfloat16", override)
    found = {problem.path: problem.message for problem in caught.value.problems}
    assert reason in found[where], found


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("rollout.vllm.placement=server", "a server takes weights by its worker methods"),
        ("rollout.vllm.tensor_parallel=2", "one GPU an engine"),
        ("model.lora.quantize=nf4", "other weights than the rounded ones"),
    ],
)
def test_an_adapter_goes_to_vllm_inside_the_trainer_alone(override: str, reason: str) -> None:
    given = ("rollout.engine=vllm", "model.device=auto", "model.dtype=bfloat16", "model.lora.push=adapter")
    load(*given)
    with pytest.raises(ConfigError, match=reason):
        load(*given, override)


def test_names_of_other_trainers_lead_here() -> None:
    with pytest.raises(ConfigError, match=r"here it is model\.lora\.alpha"):
        load_config("examples/quickstart.toml", ["model.lora_alpha=8"])


def test_a_resumed_run_keeps_its_adapters_and_may_change_their_push() -> None:
    plain, lora = (
        load_config("examples/quickstart.toml", each).model_dump(mode="json") for each in ([], ["model.lora.rank=8"])
    )
    pushed, wider = load().model_dump(mode="json"), load("model.lora.rank=16").model_dump(mode="json")
    pushed["model"]["lora"]["push"] = "adapter"
    assert fixed_keys(changed_keys(plain, lora), 0, 1, 2) == ["model.lora"]
    assert fixed_keys(changed_keys(lora, wider), 0, 1, 2) == ["model.lora.rank"]
    assert changed_keys(lora, pushed) == ["model.lora.push"] and not fixed_keys(["model.lora.push"], 0, 1, 2)
    # A run of an or1 without adapters goes on.
    old = {**plain, "model": {key: value for key, value in plain["model"].items() if key != "lora"}}
    assert changed_keys(old, plain) == []


def test_the_scale_shrinks_with_the_rank_or_its_root() -> None:
    assert LoraConfig(rank=16, alpha=32).scale == 2.0 and LoraConfig(rank=16, alpha=32, rslora=True).scale == 8.0


def test_four_bits_are_refused_without_a_gpu_and_on_several_ranks() -> None:
    config = ModelConfig(path="x", lora={"quantize": "nf4"})
    with pytest.raises(ModelError, match=r"needs a GPU and the model is on the cpu"):
        quantization_options(config, torch.device("cpu"), 1, trains=True)
    with pytest.raises(ModelError, match=r"one rank, not on 2"):
        quantization_options(config, torch.device("cuda"), 2, trains=True)
    assert quantization_options(ModelConfig(path="x", lora={}), torch.device("cpu"), 2, trains=True) == {}


def test_vllm_gets_the_next_rank_that_it_has_buffers_for() -> None:
    given = ("rollout.engine=vllm", "model.lora.push=adapter", "model.lora.rank=24")
    assert adapter_options(load(*given))["max_lora_rank"] == 32
    assert adapter_options(load()) == {}
    with pytest.raises(ValueError, match="serves at most 512"):
        adapter_options(load(*given, "model.lora.rank=513"))


def test_adapters_stay_with_their_base_weights(adder: Path, tmp_path: Path) -> None:
    config = load()
    found = base_input(config)
    assert found == {BASE: base_fingerprint(str(adder))} and base_input(load_config("examples/quickstart.toml")) == {}
    require_base({}, found, "x")
    require_base(found, found, "x")
    # A file beyond the limit is sampled: one value that differs everywhere is found, in the last bytes too.
    large = tmp_path / "model.safetensors"
    large.write_bytes(b"\1" * (65 << 20))
    first = base_fingerprint(str(tmp_path))
    with large.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\2")
    assert base_fingerprint(str(tmp_path)) != first
    with pytest.raises(RunError, match=r"weights in x are not those that the adapters of this run were trained on"):
        require_base({BASE: first}, found, "x")
