"""Where the optimizer's state is changes no bit: made early, in flat buffers, or updated beside the copies."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from or1.config import OptimConfig
from or1.dist.world import SINGLE
from or1.model.host_copies import Lane
from or1.train.host_steps import HostSteps
from or1.train.optim import MasterAdamW
from tests.model.test_checkpointing import Recorder
from tests.train.test_optim import CHOICES, config_of, loss_of, model_of, train

CPU = torch.device("cpu")


def tensors_of(optimizer: MasterAdamW) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in optimizer.state_tensors().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("choice", CHOICES)
def test_moments_made_early_change_no_bit_and_no_checkpoint(choice: dict[str, str]) -> None:
    config = config_of(choice)
    late_model, early_model = model_of(torch.bfloat16), model_of(torch.bfloat16)
    late, early = MasterAdamW(late_model, config), MasterAdamW(early_model, config)
    early.reserve()
    assert_same(tensors_of(early), tensors_of(late))
    assert not any(key.startswith(("exp_avg", "step")) for key in early.state_tensors())
    assert train(early_model, early, range(3)) == train(late_model, late, range(3))
    assert_same(tensors_of(early), tensors_of(late))
    addresses = [t.data_ptr() for t in early.state_tensors().values()]
    early.reserve()
    assert [t.data_ptr() for t in early.state_tensors().values()] == addresses, "a second call makes nothing"


@pytest.mark.parametrize("optimizer", ["adamw", "offload"])
def test_states_are_loaded_into_the_memory_that_was_reserved(optimizer: str) -> None:
    config = OptimConfig(lr=1e-2, optimizer=optimizer)
    model = model_of(torch.bfloat16)
    trained = MasterAdamW(model, config)
    before = tensors_of(trained)
    train(model, trained, range(2))
    after = tensors_of(trained)

    other = MasterAdamW(model_of(torch.bfloat16), config)
    other.reserve()
    memory = {t.data_ptr() for state in other._reserved.values() for t in other.rule.flatten(state).values()}
    # A checkpoint of a run before its first update has masters only.
    other.load_state_tensors(before, 0)
    assert_same(tensors_of(other), before)
    other.load_state_tensors(after, 2)
    assert_same(tensors_of(other), after)
    assert {t.data_ptr() for k, t in other.state_tensors().items() if not k.startswith("master")} == memory
    other.load_state_tensors(before, 0)
    assert_same(tensors_of(other), before)
    again, fresh = model_of(torch.bfloat16), model_of(torch.bfloat16)
    rolled_back, new = MasterAdamW(again, config), MasterAdamW(fresh, config)
    rolled_back.load_state_tensors(after, 2)
    rolled_back.load_state_tensors(before, 0)
    assert train(again, rolled_back, range(2)) == train(fresh, new, range(2))
    assert_same(tensors_of(rolled_back), tensors_of(new))


def test_a_parameter_without_gradient_has_no_moments_in_the_checkpoint() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "idle": nn.Linear(3, 1)})
    optimizer = MasterAdamW(model, OptimConfig())
    optimizer.reserve()
    model["used"](torch.ones(3)).sum().backward()
    optimizer.step_if_finite(torch.zeros(()))
    moments = [key for key in optimizer.state_tensors() if key.startswith("exp_avg")]
    assert moments and not any("idle" in key for key in moments)


def test_offload_has_one_buffer_of_the_exact_size_for_each_kind() -> None:
    model = model_of(torch.bfloat16)
    optimizer = MasterAdamW(model, OptimConfig(optimizer="offload"))
    optimizer.reserve()
    values = sum(p.numel() for p in model.parameters())
    train(model, optimizer, range(1))
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        parts = [t for key, t in optimizer.state_tensors().items() if key.startswith(f"{kind}.")]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts}
        assert list(storages.values()) == [4 * values], kind
        ends = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in parts)
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(ends)), "no byte between two parts"


def test_offload_masters_and_moments_are_the_bits_of_separate_tensors() -> None:
    # fp32 weights are their own masters, so only the moments are in flat buffers.
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        flat_model, plain_model = model_of(dtype), model_of(dtype)
        flat = MasterAdamW(flat_model, OptimConfig(lr=1e-2, optimizer="offload"))
        plain = MasterAdamW(plain_model, OptimConfig(lr=1e-2, optimizer="offload"))
        plain._rooms = None
        plain.masters = [m if m is p else m.clone() for m, p in zip(plain.masters, plain.shards, strict=True)]
        assert train(flat_model, flat, range(4)) == train(plain_model, plain, range(4))
        assert_same(tensors_of(flat), tensors_of(plain))


@pytest.mark.parametrize("weights", ["master", "stochastic"])
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_updates_beside_the_copies_are_those_one_after_the_other(
    dtype: torch.dtype, grad_dtype: str, weights: str
) -> None:
    config = OptimConfig(lr=1e-2, grad_clip=0.3, optimizer="offload", weights=weights, grad_dtype=grad_dtype)
    plain_model, model = model_of(dtype), model_of(dtype)
    plain, ours = MasterAdamW(plain_model, config), MasterAdamW(model, config)
    assert plain.on_host is None, "a CPU has nothing to copy"
    ours.masters = [m.clone() if m is p else m for m, p in zip(ours.masters, ours.shards, strict=True)]
    ours.on_host = HostSteps(CPU, Lane(CPU), Lane(CPU))
    assert train(model, ours, range(4)) == train(plain_model, plain, range(4))
    assert_same(tensors_of(ours), tensors_of(plain))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain_model.parameters(), strict=True))
    assert not ours.gradients()


def test_a_gradient_comes_down_while_the_one_before_is_used() -> None:
    model = model_of(torch.bfloat16)
    optimizer = MasterAdamW(model, OptimConfig(optimizer="offload"))
    lane = Recorder()
    optimizer.on_host = HostSteps(CPU, lane, lane)
    loss_of(model, 0).backward()
    optimizer.step_if_finite(torch.zeros(()))
    count = len(optimizer.params)
    assert count == 4
    # Down 0, down 1, then for each: the host waits, updates, and sends up; the next gradient is under way by then.
    expected = [("copy", 1), ("copy", 2), ("finish", 1), ("copy", 3), ("join", 3)]
    expected += [("copy", 4), ("finish", 2), ("copy", 5), ("join", 5)]
    expected += [("copy", 6), ("finish", 4), ("copy", 7), ("join", 7), ("finish", 6), ("copy", 8), ("join", 8)]
    assert lane.events == expected
    staging = optimizer.on_host._staging
    largest = max(p.numel() for p in model.parameters())
    assert [buffer.untyped_storage().nbytes() for buffer in staging] == [4 * largest] * 2


def test_resident_bytes_count_what_is_on_the_device() -> None:
    model = model_of(torch.bfloat16)
    values = sum(p.numel() for p in model.parameters())
    optimizer = MasterAdamW(model, OptimConfig(), SINGLE)
    assert optimizer.resident_bytes() == {
        "weights": 2 * values,
        "masters": 4 * values,
        "moments": 0,
        "gradients": 4 * values,
    }
    optimizer.reserve()
    steps = 4 * len(list(model.parameters()))
    assert optimizer.resident_bytes()["moments"] == 8 * values + steps
    lean = MasterAdamW(model_of(torch.bfloat16), OptimConfig(weights="stochastic", grad_dtype="bfloat16"))
    assert lean.resident_bytes()["masters"] == 0 and lean.resident_bytes()["gradients"] == 2 * values
