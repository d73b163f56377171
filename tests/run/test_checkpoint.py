"""Checkpoints are whole or absent, verified on load, and bit-exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from or1.config import OptimConfig
from or1.core.errors import CheckpointError
from or1.run.checkpoint import Checkpoint, committed_steps, load_checkpoint, load_latest, remove_partials
from or1.run.checkpoint_writer import save_checkpoint
from or1.train.optim import MasterAdamW


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"step": step, "coef": 0.1 + 0.2}, {"a": torch.randn(3, 5), "step.a": torch.tensor(2.0)})


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    saved = checkpoint(7)
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved, keep=2))
    assert loaded.step == 7 and loaded.state == saved.state
    assert all(torch.equal(loaded.tensors[k], v) for k, v in saved.tensors.items())


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert committed_steps(tmp_path) == [9, 10]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_fell_back_keeps_what_it_writes_and_not_what_is_damaged(keep: int, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, checkpoint(step), keep=3)
    damage(tmp_path / "step_20", "bit")
    damage(tmp_path / "step_30", "bit")
    for step in (12, 20, 28, 34):
        save_checkpoint(tmp_path, checkpoint(step), keep)
        latest, _ = load_latest(tmp_path)
        assert latest is not None and latest.step == step
    assert committed_steps(tmp_path) == [30, 34][-keep:], "once it is behind the run, a damaged one goes like any other"


def test_a_half_written_step_is_invisible_and_cleared(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    partial = tmp_path / ".step_2.partial"
    partial.mkdir()
    (partial / "shard_0.safetensors").write_bytes(b"half")
    remove_partials(tmp_path)
    latest, warnings = load_latest(tmp_path)
    assert latest is not None and latest.step == 1 and not warnings
    assert not partial.exists()


def damage(path: Path, kind: str) -> None:
    tensors = path / "shard_0.safetensors"
    data = bytearray(tensors.read_bytes())
    match kind:
        case "cut":
            tensors.write_bytes(data[:-8])
        case "bit":
            data[-3] ^= 1
            tensors.write_bytes(data)
        case "gone":
            tensors.unlink()
        case "manifest":
            (path / "manifest.json").write_text("{")
        case "format":
            manifest = json.loads((path / "manifest.json").read_text())
            (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


@pytest.mark.parametrize("kind", ["cut", "bit", "gone", "manifest", "format"])
def test_a_damaged_checkpoint_is_refused_by_name_for_the_one_before(kind: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    newest = save_checkpoint(tmp_path, checkpoint(2), keep=2)
    damage(newest, kind)
    with pytest.raises(CheckpointError, match="step_2"):
        load_checkpoint(newest)
    latest, warnings = load_latest(tmp_path)
    assert latest is not None and latest.step == 1
    assert len(warnings) == 1 and "step_2" in warnings[0]


def test_it_never_starts_anew_in_silence_when_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    damage(save_checkpoint(tmp_path, checkpoint(1), keep=2), "bit")
    with pytest.raises(CheckpointError, match="--fresh"):
        load_latest(tmp_path)


def model_of(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1)).to(dtype)


def train_steps(model: torch.nn.Module, optimizer: MasterAdamW, seeds: range) -> list[float]:
    norms = []
    for seed in seeds:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
        loss = model(x).square().mean()
        loss.backward()
        norms.append(optimizer.step_if_finite(loss.detach()).grad_norm)
    return norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_optimizer_state_resumes_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    config = OptimConfig(lr=1e-2, warmup_steps=3)
    straight = model_of(dtype)
    straight_norms = train_steps(straight, MasterAdamW(straight, config), range(8))

    first = model_of(dtype)
    optimizer = MasterAdamW(first, config)
    norms = train_steps(first, optimizer, range(4))
    path = save_checkpoint(tmp_path, Checkpoint(4, {"updates": optimizer.updates}, optimizer.state_tensors()), keep=1)

    loaded = load_checkpoint(path)
    second = model_of(dtype)
    resumed = MasterAdamW(second, config)
    resumed.load_state_tensors(loaded.tensors, loaded.state["updates"])
    norms += train_steps(second, resumed, range(4, 8))
    assert norms == straight_norms
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), straight.parameters(), strict=True))


def test_small_updates_to_bf16_weights_are_not_lost() -> None:
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = MasterAdamW(model, OptimConfig(lr=1e-3, weight_decay=0.0))
    for _ in range(20):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step_if_finite(torch.tensor(0.0))
    # One step of 1e-3 is less than half of bf16's spacing below 1 (2^-8), so without a master nothing would move.
    assert model.weight.item() == pytest.approx(0.98, abs=2**-8)


@pytest.mark.parametrize("where", ["loss", "grad"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_update_changes_nothing(where: str, value: float) -> None:
    model = model_of(torch.float32)
    optimizer = MasterAdamW(model, OptimConfig(lr=1e-2, warmup_steps=5))
    train_steps(model, optimizer, range(2))
    before = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    loss = model(torch.ones(1, 4)).sum()
    loss.backward()
    if where == "grad":
        next(model.parameters()).grad[0, 0] = value
    result = optimizer.step_if_finite(torch.tensor(value) if where == "loss" else loss.detach())
    assert not result.took and optimizer.updates == 2
    after = optimizer.state_tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in model.parameters())


def test_gradient_is_clipped_to_the_limit_and_reported_before_clipping() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = MasterAdamW(model, OptimConfig(lr=1e-3, grad_clip=1.0))
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    seen = []
    update = optimizer.rule.update
    optimizer.rule.update = lambda weight, grad, *rest: (seen.append(grad.clone()), update(weight, grad, *rest))
    assert optimizer.step_if_finite(torch.tensor(0.0)).grad_norm == pytest.approx(5.0)
    assert seen[0].norm().item() == pytest.approx(1.0, rel=1e-4)
