"""Optimizer choices: each against its definition, and each resumed bit for bit from safetensors."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from or1.config import OptimConfig
from or1.core.errors import OptimizerError
from or1.run.checkpoint import Checkpoint, load_checkpoint
from or1.run.checkpoint_writer import save_checkpoint
from or1.train.adam import round_stochastically
from or1.train.optim import MasterAdamW

CHOICES = [
    pytest.param({"optimizer": o, "weights": w, "grad_dtype": g}, id=f"{o}-{w}-{g}")
    for o, w, g in itertools.product(
        ("adamw", "adamw8bit", "offload"), ("master", "stochastic"), ("float32", "bfloat16")
    )
]


def model_of(dtype: torch.dtype) -> nn.Module:
    # 64 x 128 values are quantized by adamw8bit; the rest are below its limit. Names end alike on purpose.
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(64, 128), "b": nn.ModuleDict({"a": nn.Linear(128, 1)})}).to(dtype)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)).to(model["a"].weight.dtype)
    return (model["b"]["a"](model["a"](x).tanh()).float() - x[:, :1].float()).square().mean()


def train(model: nn.Module, optimizer: MasterAdamW, seeds: range) -> list[float]:
    norms = []
    for seed in seeds:
        for part in (0, 1000):
            (loss_of(model, seed + part) / 2).backward()
        norms.append(optimizer.step_if_finite(torch.zeros(())).grad_norm)
    return norms


def config_of(choice: dict[str, str], **more: float) -> OptimConfig:
    if choice["optimizer"] == "adamw8bit":
        pytest.importorskip("torchao", reason="adamw8bit needs torchao")
    return OptimConfig(**{"lr": 1e-2, "warmup_steps": 3} | choice | more)


@pytest.mark.parametrize("choice", CHOICES)
def test_each_choice_resumes_bit_for_bit(choice: dict[str, str], tmp_path: Path) -> None:
    config = config_of(choice)
    straight = model_of(torch.bfloat16)
    straight_norms = train(straight, MasterAdamW(straight, config), range(6))

    first = model_of(torch.bfloat16)
    optimizer = MasterAdamW(first, config)
    norms = train(first, optimizer, range(3))
    path = save_checkpoint(tmp_path, Checkpoint(3, {"updates": optimizer.updates}, optimizer.state_tensors()), keep=1)
    saved = load_checkpoint(path)
    quantized = {name for name, t in saved.tensors.items() if t.dtype == torch.uint8}
    eight = {"exp_avg.codes.a.weight", "exp_avg_sq.codes.a.weight"}
    assert quantized == (eight if choice["optimizer"] == "adamw8bit" else set())

    torch.manual_seed(99)
    second = model_of(torch.bfloat16)
    resumed = MasterAdamW(second, config)
    resumed.load_state_tensors(saved.tensors, saved.state["updates"])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    norms += train(second, resumed, range(3, 6))
    assert norms == straight_norms
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), straight.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "offload"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_moments_are_torchs_adamw(optimizer: str, dtype: torch.dtype) -> None:
    ours, theirs = model_of(dtype), model_of(dtype)
    config = OptimConfig(lr=1e-2, weight_decay=0.1, grad_clip=0.3, optimizer=optimizer)
    decay = [p for p in theirs.parameters() if p.ndim >= 2]
    plain = [p for p in theirs.parameters() if p.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], 1e-2, config.betas, config.eps
    )
    norms = train(ours, MasterAdamW(ours, config), range(5))
    for seed, norm in enumerate(norms):
        for part in (0, 1000):
            (loss_of(theirs, seed + part) / 2).backward()
        assert nn.utils.clip_grad_norm_(theirs.parameters(), 0.3).item() == pytest.approx(norm, rel=1e-5)
        reference.step()
        reference.zero_grad()
    assert max(norms) > 0.3, "the test must see clipping"
    tight = 1e-6 if dtype == torch.float32 else 1e-12
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tight, atol=tight)


def test_offload_keeps_masters_and_moments_in_host_memory() -> None:
    model = model_of(torch.bfloat16)
    optimizer = MasterAdamW(model, OptimConfig(optimizer="offload"))
    train(model, optimizer, range(1))
    assert all(t.device.type == "cpu" for t in optimizer.state_tensors().values())
    assert optimizer.masters[0].dtype == torch.float32
    assert torch.equal(optimizer.masters[0].to(torch.bfloat16), model["a"].weight)


def test_eight_bit_moments_are_torchaos_own_update() -> None:
    pytest.importorskip("torchao")
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    model = model_of(torch.float32)
    optimizer = MasterAdamW(model, OptimConfig(lr=1e-2, weight_decay=0.1, optimizer="adamw8bit", grad_clip=1e30))
    weight, step = model["a"].weight.detach().clone(), torch.tensor(0.0)
    moments = [OptimState8bit.zeros(weight.shape, signed, 256, "cpu", dtype=weight.dtype) for signed in (True, False)]
    for seed in range(3):
        loss_of(model, seed).backward()
        grad = model["a"].weight.grad.clone()
        optimizer.step_if_finite(torch.zeros(()))
        step += 1
        single_param_adam(weight, grad, step, *moments, None, torch.tensor(1e-2), 0.9, 0.999, 0.1, 1e-8, True, False)
    torch.testing.assert_close(weight, model["a"].weight, rtol=0, atol=0)


def test_eight_bit_moments_train_nearly_as_full_ones() -> None:
    pytest.importorskip("torchao")
    losses = {}
    for name in ("adamw", "adamw8bit"):
        model = model_of(torch.float32)
        train(model, MasterAdamW(model, OptimConfig(lr=3e-3, optimizer=name)), range(60))
        losses[name] = sum(loss_of(model, seed).item() for seed in range(500, 520)) / 20
    start = sum(loss_of(model_of(torch.float32), seed).item() for seed in range(500, 520)) / 20
    assert losses["adamw"] < 0.5 * start
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.15)


def test_eight_bit_moments_take_a_quarter_of_the_bytes() -> None:
    pytest.importorskip("torchao")

    def moment_bytes(name: str) -> int:
        model = nn.Linear(512, 512, bias=False)
        optimizer = MasterAdamW(model, OptimConfig(optimizer=name))
        model(torch.randn(4, 512)).sum().backward()
        optimizer.step_if_finite(torch.zeros(()))
        return sum(t.nbytes for key, t in optimizer.state_tensors().items() if key.startswith("exp_avg"))

    assert moment_bytes("adamw8bit") < 0.26 * moment_bytes("adamw")


def test_stochastic_rounding_is_exact_on_average_and_a_neighbour_always() -> None:
    x = torch.tensor([1.0, 1.0 + 2**-10, -3.1415927, 1e-30, 3e-39, 0.0, float("inf"), float("nan")])
    rounded = torch.stack([round_stochastically(x, seed) for seed in range(4000)]).double()
    assert torch.equal(rounded[:, 0], torch.ones(4000, dtype=torch.float64)) and rounded[:, 5].eq(0).all()
    assert rounded[:, 6].isposinf().all() and rounded[:, 7].isnan().all()
    for i in (1, 2, 3, 4):
        values = rounded[:, i].unique()
        assert len(values) == 2 and values[0] <= x[i].double() <= values[1]
        spread = (values[1] - values[0]).item()
        # Standard error of the mean of 4,000 draws between two values is below spread / 120.
        assert abs(rounded[:, i].mean().item() - x[i].double().item()) < 5 * spread / 120


@pytest.mark.parametrize("weights", ["master", "stochastic"])
def test_small_updates_of_bf16_weights_survive(weights: str) -> None:
    model = nn.Linear(4096, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = MasterAdamW(model, OptimConfig(lr=1e-4, weight_decay=0.0, weights=weights))
    for _ in range(20):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step_if_finite(torch.zeros(()))
    # bf16's spacing below 1 is 2^-8: a step of 1e-4 rounded to nearest would never move a weight.
    kept = optimizer.masters[0] if weights == "master" else model.weight
    assert 1 - kept.double().mean().item() == pytest.approx(20 * 1e-4, rel=0.15)
    assert (len(model.weight.unique()) > 1) == (weights == "stochastic")


@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
def test_gradients_are_summed_in_the_type_asked_for(grad_dtype: str) -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = MasterAdamW(model, OptimConfig(grad_dtype=grad_dtype))
    for value in [1.0] + [2.0**-9] * 64:
        (model.weight * value).sum().backward()
    (grad,) = optimizer.gradients().values()
    assert grad.dtype == getattr(torch, grad_dtype)
    # In bf16 each of the 64 small gradients is rounded away beside the 1.
    assert grad.item() == (1.125 if grad_dtype == "float32" else 1.0)
    expected = grad.item()
    assert optimizer.step_if_finite(torch.zeros(())).grad_norm == expected
    assert not optimizer.gradients()


def test_a_state_of_another_choice_is_refused() -> None:
    model = model_of(torch.bfloat16)
    full = MasterAdamW(model, OptimConfig())
    train(model, full, range(1))
    with pytest.raises(OptimizerError, match=r"float32.*bfloat16.*optim\.weights"):
        MasterAdamW(model, OptimConfig(weights="stochastic")).load_state_tensors(full.state_tensors(), 1)
    pytest.importorskip("torchao")
    with pytest.raises(OptimizerError, match=r"no exp_avg\.codes.*optim\.optimizer"):
        MasterAdamW(model, OptimConfig(optimizer="adamw8bit")).load_state_tensors(full.state_tensors(), 1)


def test_without_torchao_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptimizerError, match=r"or1\[torchao\]"):
        MasterAdamW(nn.Linear(1, 1), OptimConfig(optimizer="adamw8bit"))
