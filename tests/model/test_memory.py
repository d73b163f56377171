"""What saves memory changes no number: checkpointed layers, host copies, tiled MLPs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from or1.config import ModelConfig
from or1.core.errors import MemoryOptionError
from or1.core.types import TrainSequence
from or1.model.forward import hidden_states
from or1.model.host_copies import Shelf
from or1.model.load import load_model
from or1.model.memory import apply_liger, checkpointing_mode, tile_mlps, tiled_forward
from or1.model.rows import pack_indexed


def sequences_of(shapes: list[tuple[int, int]], seed: int = 0) -> list[TrainSequence]:
    rng = np.random.default_rng(seed)
    made = []
    for prompt, response in shapes:
        ids = rng.integers(5, 19, prompt + response).astype(np.int32)
        made.append(TrainSequence(ids[:prompt], ids[prompt:], rng.normal(-2, 1, response), float(rng.normal())))
    return made


SEQUENCES = sequences_of([(3, 20), (5, 9), (2, 30), (4, 4), (6, 17), (3, 12)])


def load(adder: Path, **options: object) -> PreTrainedModel:
    return load_model(ModelConfig(path=str(adder), dtype="float64", device="cpu", **options)).train()


def states_and_gradients(model: PreTrainedModel) -> list[Tensor]:
    ((_, batch),) = pack_indexed(SEQUENCES, 4096)
    states_TH = hidden_states(model, batch)
    torch.manual_seed(1)
    (states_TH * torch.randn_like(states_TH)).sum().backward()
    return [states_TH.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("tile", [0, 16, 33])
@pytest.mark.parametrize("checkpointing", ["none", "layer", "selective", "offload"])
def test_checkpointing_and_tiles_change_nothing(checkpointing: str, tile: int, adder: Path) -> None:
    plain = states_and_gradients(load(adder, mlp_tile_tokens=0))
    model = load(adder, gradient_checkpointing=checkpointing, mlp_tile_tokens=tile)
    calls: list[int] = []
    model.get_decoder().layers[0].mlp.act_fn.register_forward_hook(lambda m, a, out: calls.append(out.shape[-2]))
    for ours, theirs in zip(states_and_gradients(model), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * theirs.abs().max().item())
    tokens = len(plain[0])
    tiles = [min(tile, tokens - start) for start in range(0, tokens, tile)] if tile else [tokens]
    # Tiles are recomputed once in backward and not once more by the checkpoint around them.
    assert calls == tiles * (1 if checkpointing == "none" and not tile else 2)


def test_true_and_false_still_mean_layer_and_none() -> None:
    for value, expected in ((True, "layer"), (False, "none"), ("offload", "offload"), ("auto", "auto")):
        assert ModelConfig(path="x", gradient_checkpointing=value).gradient_checkpointing == expected
    with pytest.raises(ValidationError):
        ModelConfig(path="x", gradient_checkpointing="sometimes")


def test_auto_recomputes_on_a_gpu_and_nothing_on_a_cpu() -> None:
    assert ModelConfig(path="x").gradient_checkpointing == "auto"
    assert checkpointing_mode("auto", torch.device("cpu")) == "none"
    assert checkpointing_mode("auto", torch.device("cuda")) == "selective"
    assert checkpointing_mode("offload", torch.device("cuda")) == "offload"


def test_checkpointing_keeps_one_input_a_layer(adder: Path) -> None:
    def saved_bytes(model: PreTrainedModel) -> int:
        kept = {}
        parameters = {p.data_ptr() for p in model.parameters()}

        def note(t: Tensor) -> Tensor:
            if t.data_ptr() not in parameters:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        ((_, batch),) = pack_indexed(SEQUENCES, 4096)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            states = hidden_states(model, batch)
        del states
        return sum(kept.values())

    assert saved_bytes(load(adder, gradient_checkpointing="layer")) < 0.25 * saved_bytes(load(adder))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tiles_sum_weight_gradients_no_worse_than_one_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 16)).to(dtype)
    exact = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 16)).double()
    exact.load_state_dict({k: v.double() for k, v in mlp.state_dict().items()})
    x, upstream = torch.randn(2, 300, 16, dtype=dtype), torch.randn(2, 300, 16, dtype=dtype)

    def gradients(function, module: nn.Module, cast: torch.dtype) -> list[Tensor]:
        leaf = x.to(cast).requires_grad_()
        out = function(leaf)
        return [out, *torch.autograd.grad(out, (leaf, *module.parameters()), upstream.to(cast))]

    tiled = gradients(lambda t: tiled_forward(mlp, t, 7, tuple(mlp.parameters())), mlp, dtype)
    plain, truth = gradients(mlp, mlp, dtype), gradients(exact, exact, torch.float64)
    for ours, theirs, right in zip(tiled, plain, truth, strict=True):
        # Of all values together: the largest of few errors is a matter of luck, for both.
        assert (ours - right).norm() <= 2 * (theirs - right).norm() + 1e-12 * right.norm()


def test_only_gated_mlps_are_tiled(adder: Path) -> None:
    model = load(adder, mlp_tile_tokens=0)
    assert tile_mlps(model, 8) == len(model.get_decoder().layers)
    assert tile_mlps(nn.Sequential(nn.Linear(2, 2)), 8) == 0


def test_liger_says_why_not(adder: Path) -> None:
    model = load(adder)
    assert apply_liger(model, "auto", torch.device("cpu")) is False
    with pytest.raises(MemoryOptionError, match=r'model\.liger = "on".*need a GPU.*"auto"'):
        load(adder, liger="on")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_offload_is_exact_and_liger_is_close(adder: Path) -> None:
    big, shelf = torch.randn(1 << 20, device="cuda"), Shelf(torch.device("cuda"))
    kept = shelf.put(big)
    assert torch.equal(shelf.take(kept), big) and kept.host.is_pinned()

    def run(**options: object) -> list[Tensor]:
        model = load_model(ModelConfig(path=str(adder), dtype="float32", device="cuda", **options)).train()
        ((_, batch),) = pack_indexed(SEQUENCES, 4096, "cuda")
        states_TH = hidden_states(model, batch)
        states_TH.square().sum().backward()
        return [states_TH.detach(), *(p.grad for p in model.parameters())]

    plain = run(liger="off")
    for ours, theirs in zip(run(liger="off", gradient_checkpointing="offload"), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(run(liger="on"), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
