"""Compiled parts of the layers: the same states and gradients, and refusals with a reason."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen2 import modeling_qwen2

from or1.config import ModelConfig
from or1.core.errors import MemoryOptionError
from or1.model.compiled import compile_elementwise
from or1.model.forward import hidden_states
from or1.model.load import load_model
from or1.model.rows import pack_indexed
from tests.model.test_memory import SEQUENCES

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture
def rotary() -> Iterator[None]:
    """Give the architecture its own rotary embedding back."""
    before = modeling_qwen2.apply_rotary_pos_emb
    yield
    modeling_qwen2.apply_rotary_pos_emb = before


def load(adder: Path, **options: object) -> PreTrainedModel:
    return load_model(ModelConfig(path=str(adder), dtype="float32", device="cpu", **options)).train()


def states_and_gradients(model: PreTrainedModel, frozen: bool, tokens: int) -> list[Tensor]:
    """Return states and gradients of two packed rows; frozen: of the query projections alone, as with adapters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or "q_proj" in name)
    for row, (_, batch) in enumerate(list(pack_indexed(SEQUENCES, tokens))[:2]):
        states_TH = hidden_states(model, batch)
        torch.manual_seed(row)
        (states_TH * torch.randn_like(states_TH)).sum().backward()
    return [states_TH.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_compiled_is_eager(adder: Path, frozen: bool, **options: object) -> None:
    from torch._dynamo.utils import counters

    wanted = states_and_gradients(load(adder), frozen, 64)
    counters.clear()
    torch._dynamo.reset()
    compiled = states_and_gradients(load(adder, compile=True, **options), frozen, 64)
    # The parts, each with at most a second version: neither layers nor lengths have code of their own.
    assert 3 <= counters["stats"]["unique_graphs"] <= 6 and not counters["graph_break"]
    assert len(compiled) == len(wanted) > 3
    for ours, theirs in zip(compiled, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@needs_compiler
@pytest.mark.slow
def test_gradients_are_those_of_eager_layers_with_checkpoints_and_frozen_weights(adder: Path, rotary: None) -> None:
    assert_compiled_is_eager(adder, frozen=True, gradient_checkpointing="layer")


@needs_compiler
@pytest.mark.nightly
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "layer", "selective", "offload"])
@pytest.mark.parametrize("tile", [0, 16])
def test_gradients_are_those_of_eager_layers(
    adder: Path, rotary: None, tile: int, checkpointing: str, frozen: bool
) -> None:
    assert_compiled_is_eager(adder, frozen, gradient_checkpointing=checkpointing, mlp_tile_tokens=tile)


def test_where_nothing_can_be_compiled_the_reason_is_named(
    adder: Path, rotary: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(adder)
    with pytest.raises(MemoryOptionError, match="the model is on the meta, and or1 compiles for CPUs"):
        compile_elementwise(model, torch.device("meta"))
    other = nn.Module()
    other.config = model.config
    monkeypatch.setattr("or1.model.compiled._why_not", lambda device: "")
    with pytest.raises(MemoryOptionError, match="qwen2 has no norm and no gated MLP"):
        compile_elementwise(other, CPU)
    monkeypatch.undo()
    monkeypatch.setattr("or1.model.compiled.shutil.which", lambda name: None)
    with pytest.raises(MemoryOptionError, match="finds no C\\+\\+ compiler"):
        compile_elementwise(model, CPU)


@needs_compiler
@pytest.mark.slow
def test_norms_mlps_and_rotary_are_found_and_nothing_is_compiled_before_a_row(adder: Path, rotary: None) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    model = load(adder)
    layers = model.config.num_hidden_layers
    assert compile_elementwise(model, CPU) == 3 * layers + 1
    first = modeling_qwen2.apply_rotary_pos_emb
    compile_elementwise(load(adder), CPU)
    assert modeling_qwen2.apply_rotary_pos_emb is first and not counters["stats"]
