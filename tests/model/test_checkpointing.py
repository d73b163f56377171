"""Selective checkpoints keep attention's outputs, and offloaded inputs come back one layer ahead; no bit changes."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from or1.core.errors import MemoryOptionError
from or1.model import host_copies
from or1.model.host_copies import HostPool, Lane, Shelf, host_buffer
from or1.model.memory import checkpoint_layers
from or1.model.selective import is_attention, selective_checkpoint
from tests.model.test_memory import load, states_and_gradients

FORWARD = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Calls(TorchDispatchMode):
    """Counts the operators of attention that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.name():
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def counted(model: PreTrainedModel) -> tuple[list[Tensor], int, int]:
    with Calls() as calls:
        tensors = states_and_gradients(model)
    return tensors, calls.counts[FORWARD], calls.counts[f"{FORWARD}_backward"]


def test_attention_runs_once_and_the_gradient_is_the_same_bits(adder: Path) -> None:
    plain, forwards, backwards = counted(load(adder))
    assert forwards == backwards > 0
    layer, again, _ = counted(load(adder, gradient_checkpointing="layer"))
    ours, once, back = counted(load(adder, gradient_checkpointing="selective"))
    assert (again, once, back) == (2 * forwards, forwards, backwards)
    assert all(torch.equal(a, b) for a, b in zip(ours, layer, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def attention(x: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(x.sin(), x, x.cos(), is_causal=True)


def gradient(function, x: Tensor, times: int = 1) -> Tensor:
    leaf = x.clone().requires_grad_()
    loss = function(leaf).square().sum()
    for i in range(times):
        loss.backward(retain_graph=i + 1 < times)
    return leaf.grad


def test_a_second_backward_computes_what_the_first_has_used_up() -> None:
    x = torch.randn(2, 3, 20, 8, dtype=torch.float64)
    expected = gradient(attention, x)
    assert torch.equal(gradient(lambda t: selective_checkpoint(attention, t), x), expected)
    twice = gradient(lambda t: selective_checkpoint(attention, t), x, times=2)
    assert torch.equal(twice, 2 * expected)


def test_an_output_that_the_layer_changes_in_place_is_computed_again() -> None:
    def layer(x: Tensor) -> Tensor:
        out = attention(x)
        kept = out.exp()
        # Below autograd, as some fused kernels write: the exponential's gradient needs no former value of `out`.
        out.data.mul_(3.0)
        with torch.no_grad():
            out.mul_(1.0)
        return kept

    x = torch.randn(1, 2, 12, 8, dtype=torch.float64)
    with Calls() as calls:
        selective = gradient(lambda t: selective_checkpoint(layer, t), x)
    assert calls.counts[FORWARD] == 2
    assert torch.equal(selective, gradient(lambda t: checkpoint(layer, t, use_reentrant=False), x))


def test_attention_of_every_library_is_recognised_and_no_backward() -> None:
    def named(name: str) -> bool:
        # A class and not an instance: the answers are cached by hash, which SimpleNamespace lacks.
        return is_attention(type("Op", (), {"name": staticmethod(lambda: name)}))

    kept = ("torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::fwd")
    kept += ("aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention")
    assert all(named(name) for name in kept)
    others = ("torch_attn::_varlen_attn_backward", "flash_attn_3::bwd", "aten::mm", "aten::_fused_sdp_choice")
    assert not any(named(name) for name in others)


def test_auto_leaves_a_model_alone_that_cannot_be_checkpointed(adder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("or1.model.prepare.checkpointing_mode", lambda wanted, device: "selective")
    assert load(adder).get_decoder().layers[0].gradient_checkpointing
    monkeypatch.setattr(type(load(adder)), "supports_gradient_checkpointing", False)
    assert not load(adder).get_decoder().layers[0].gradient_checkpointing
    with pytest.raises(MemoryOptionError, match=r'gradient_checkpointing = "none"'):
        load(adder, gradient_checkpointing="selective")


class Recorder(Lane):
    """A lane that copies at once and writes down the order of the calls."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.events: list[tuple[str, int]] = []
        self.marks = 0

    def copy(self, target: Tensor, source: Tensor) -> int:
        super().copy(target, source)
        self.marks += 1
        self.events.append(("copy", self.marks))
        return self.marks

    def join(self, mark: int) -> None:
        self.events.append(("join", mark))

    def finish(self, mark: int) -> None:
        self.events.append(("finish", mark))


def test_offloaded_inputs_come_back_one_layer_ahead_with_the_same_bits(adder: Path) -> None:
    plain = states_and_gradients(load(adder, gradient_checkpointing="layer"))
    model = load(adder)
    layers, lane = len(model.get_decoder().layers), Recorder()
    shelf = Shelf(torch.device("cpu"), least_bytes=0, lane=lane)
    checkpoint_layers(model, "offload", shelf)
    seen: list[int] = []
    for layer in model.get_decoder().layers:
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append(len(lane.events)))
    for ours, theirs in zip(states_and_gradients(model), plain, strict=True):
        assert torch.equal(ours, theirs)
    assert layers == 3
    # Out: one copy a layer. Back: the last input, and each time the input of the layer before.
    back = [("copy", 4), ("join", 4), ("copy", 5), ("join", 5), ("copy", 6), ("join", 6)]
    assert lane.events == [("copy", 1), ("copy", 2), ("copy", 3), *back]
    # When a layer runs again, the copy for the layer before has been started already.
    assert seen == [1, 2, 3, 6, 8, 9]
    model.zero_grad()
    gc.collect()
    assert shelf.pool.free_bytes > 0
    before = shelf.pool.free_bytes
    states_and_gradients(model)
    gc.collect()
    assert shelf.pool.free_bytes == before, "the buffers of the first row serve the second"


def test_an_abandoned_graph_gives_its_buffers_back_and_is_not_prefetched() -> None:
    lane = Recorder()
    shelf = Shelf(torch.device("cpu"), least_bytes=8, lane=lane)
    x = torch.randn(4, dtype=torch.float64)
    lost, small = shelf.put(x), torch.ones(1, dtype=torch.int32)
    assert shelf.put(small) is small and shelf.take(small) is small
    del lost
    kept = shelf.put(x + 1)
    assert torch.equal(shelf.take(kept), x + 1) and torch.equal(shelf.take(kept), x + 1)
    assert [name for name, _ in lane.events] == ["copy", "copy", "copy", "join", "copy", "join"]


def test_a_pool_reuses_and_does_not_grow() -> None:
    pool = HostPool(pin=False)
    small, large = pool.take(100), pool.take(300)
    assert (small.nbytes, large.nbytes) == (100, 300)
    pool.give(small)
    pool.give(large)
    again = pool.take(80)
    assert again is small and pool.free_bytes == 300
    assert pool.take(1000).nbytes == 1000 and pool.free_bytes == 0


def test_a_copy_that_would_convert_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32.*bfloat16.*blocks"):
        Lane(torch.device("cpu")).copy(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2))


def test_pinned_memory_has_the_exact_size_and_is_released_after_the_last_view(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: dict[int, int] = {}

    def register(address: int, nbytes: int, flags: int) -> int:
        locked[address] = nbytes
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=locked.pop)
    monkeypatch.setattr(host_copies.torch.cuda, "cudart", lambda: runtime)
    buffer = host_buffer(1_000_003, torch.float32, pin=True)
    assert locked == {buffer.data_ptr(): 4_000_012} and buffer.untyped_storage().nbytes() == 4_000_012
    view = buffer[5:10]
    del buffer
    gc.collect()
    assert len(locked) == 1
    view.zero_()
    del view
    gc.collect()
    assert not locked
    assert host_buffer(0, torch.float32, pin=True).numel() == 0 and not locked
