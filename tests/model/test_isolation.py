"""The model itself is asked whether packed documents stay apart; no list of names decides."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import MambaConfig

from benchmarks.architectures.cases import CASES
from benchmarks.architectures.check import page, verdict, write_checkpoint
from or1.cli import main
from or1.config import ModelConfig
from or1.core.errors import AttentionError, DistError, PackingError
from or1.dist.fsdp import decoder_layers
from or1.dist.ulysses import check_heads
from or1.model import isolation
from or1.model.isolation import _one_of_each, rehearse_model, require_isolation
from or1.model.load import ModelError, load_model, remarks_of
from tests.helpers.small_run import arguments

BY_NAME = {case.name: case for case in CASES}


def settings(path: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(path=str(path), dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["falcon_h1", "mamba2", "jamba", "nemotron_h", "minimax", "bloom", "xglm"])
def test_architectures_whose_documents_see_each_other_are_refused(name: str, dtype: str, tmp_path: Path) -> None:
    write_checkpoint(BY_NAME[name], tmp_path)
    for action in (rehearse_model, load_model):
        with pytest.raises(PackingError, match=rf"\({name}, \w+\).*see each other.*Train another.*docs/models.md"):
            action(settings(tmp_path, dtype))
    # What only generates packs nothing.
    if dtype == "float32":
        load_model(settings(tmp_path), packs=False)


@pytest.mark.parametrize("name", ["stablelm", "nemotron"])
def test_an_attention_that_never_hears_of_the_layout_is_refused(name: str, tmp_path: Path) -> None:
    write_checkpoint(BY_NAME[name], tmp_path)
    for action in (rehearse_model, load_model):
        with pytest.raises(AttentionError, match="do not hand the layout"):
            action(settings(tmp_path))


@pytest.mark.parametrize("name", ["bert", "minicpm3", "bart"])
def test_a_packed_row_that_is_not_what_generation_computes_is_refused(name: str, tmp_path: Path) -> None:
    write_checkpoint(BY_NAME[name], tmp_path)
    with pytest.raises(PackingError, match="not what the model computes for each alone"):
        load_model(settings(tmp_path))


@pytest.mark.parametrize("name", ["falcon", "gpt_neo", "mpt", "deepseek_v32", "llama4_text", "t5", "vit", "mamba"])
def test_no_architecture_ends_in_a_traceback(
    name: str, tmp_path: Path, adder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    write_checkpoint(BY_NAME[name], folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(adder / file, folder)
    capsys.readouterr()
    assert main(arguments(tmp_path / "run", "--dry-run", model__path=folder)) == 70
    said = capsys.readouterr().err
    assert name in said and "Traceback" not in said and said.count("\n") == 1
    with pytest.raises(ModelError):
        load_model(settings(folder))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "granite", "gpt2", "opt", "mixtral", "cohere"])
def test_soft_caps_sinks_scales_and_noise_train(name: str, tmp_path: Path) -> None:
    # The step checks that engine and trainer agree in training mode, and that the weights move.
    assert verdict(BY_NAME[name], tmp_path).text == "trains"


@pytest.mark.parametrize("break_it", ["window", "scale", "positions", "future", "noise"])
def test_what_no_name_tells_is_found_in_the_numbers(break_it: str, adder: Path) -> None:
    model = load_model(settings(adder))
    decoder = model.get_decoder()
    if break_it == "window":
        # A convolution over the row, such as state-space layers have.
        model.get_input_embeddings().register_forward_hook(lambda _, __, x: x + 0.01 * x.roll(1, dims=1))
    elif break_it == "future":
        decoder.norm.register_forward_hook(lambda _, __, x: x + 1e-3 * x.roll(-1, dims=1))
    elif break_it == "scale":
        model.get_output_embeddings().logit_scale = 1.1
    elif break_it == "noise":
        decoder.norm.register_forward_hook(lambda m, _, x: x + 0.1 * torch.randn_like(x) if m.training else x)
    else:
        whole = decoder.forward
        decoder.forward = lambda **kw: whole(**kw | {"position_ids": torch.arange(kw["input_ids"].shape[1])[None]})
    with pytest.raises(PackingError):
        require_isolation(model, "x")


def test_the_question_costs_little_and_leaves_no_trace(adder: Path) -> None:
    model = load_model(settings(adder)).train()
    before = torch.random.get_rng_state()
    require_isolation(model, "x")
    began = time.process_time()
    require_isolation(model, "x")
    # Processor time, which other programs do not add to; about 0.2 s here.
    assert time.process_time() - began < 5
    assert model.training and torch.random.get_rng_state().equal(before)
    assert all(p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == "or1_packed"


def test_a_few_layers_have_one_of_each_kind() -> None:
    class Layer(nn.Module):
        def __init__(self, width: int, window: int | None):
            super().__init__()
            self.linear, self.window = nn.Linear(width, width), window

    layers = nn.ModuleList([Layer(4, 8), Layer(4, 16), Layer(4, None), Layer(4, 8), Layer(8, None), Layer(4, 8)])
    assert _one_of_each(layers) == 5 and _one_of_each(layers[:2]) == 1 and _one_of_each(layers[:4]) == 3


@pytest.mark.parametrize(("name", "refused"), [("llama", False), ("gpt2", False), ("gemma2", False), ("jamba", True)])
def test_a_large_model_is_asked_about_its_first_layers(
    name: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "_SMALL", 0)
    write_checkpoint(BY_NAME[name], tmp_path)
    if refused:
        with pytest.raises(PackingError, match="see each other"):
            load_model(settings(tmp_path))
        return
    model = load_model(settings(tmp_path))
    assert len(decoder_layers(model)) == model.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": "layer"},
        {"mlp_tile_tokens": 4},
        {"gradient_checkpointing": "offload", "mlp_tile_tokens": 4},
    ],
)
def test_the_question_can_be_asked_with_every_option_that_saves_memory(options: dict, adder: Path) -> None:
    load_model(settings(adder).model_copy(update=options))


def test_heads_that_a_config_does_not_name_are_no_traceback() -> None:
    config = MambaConfig(num_hidden_layers=1)
    check_heads(config, 1)
    with pytest.raises(DistError, match=r"sequence_parallel = 2, but mamba has no num_attention_heads"):
        check_heads(config, 2)


def test_a_model_too_large_for_a_dry_run_is_told(tmp_path: Path, adder: Path) -> None:
    config = json.loads((adder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 8192, "intermediate_size": 16384}))
    assert any("checked when the model is loaded" in line for line in rehearse_model(settings(tmp_path)))


def test_dropout_of_any_kind_is_off_and_told(adder: Path, tmp_path: Path) -> None:
    write_checkpoint(BY_NAME["opt"], tmp_path / "opt")
    model = load_model(settings(tmp_path / "opt")).train()
    assert model.config.dropout == 0 and model.config.layerdrop == 0
    (remark,) = remarks_of(model)
    assert "dropout = 0.1, layerdrop = 0.1; or1 trains without" in remark
    write_checkpoint(BY_NAME["gpt2"], tmp_path / "gpt2")
    model = load_model(settings(tmp_path / "gpt2")).train()
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p]
    assert remarks_of(load_model(settings(adder))) == []


@pytest.mark.slow
def test_the_page_of_architectures_is_what_the_program_finds(root: Path) -> None:
    assert (root / "docs" / "models.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["eager", "sdpa", None])
def test_no_key_of_a_config_replaces_the_attention(key: str, value: str | None, adder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(adder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    model = load_model(settings(folder))
    assert model.config._attn_implementation == "or1_packed"
    assert bool(remarks_of(model)) == (value is not None)


@pytest.mark.parametrize("where", ["", "text_config"])
@pytest.mark.parametrize(
    "key",
    [
        "_attn_implementation",
        "attn_implementation",
        "_experts_implementation",
        "moe_implementation",
        "_attn_implementation_internal",
    ],
)
@pytest.mark.parametrize("value", ["org/kernel@main:fn", {"": "org/kernel"}])
def test_a_kernel_of_the_hub_is_refused(key: str, value: object, where: str, adder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(adder, folder)
    config = json.loads((folder / "config.json").read_text())
    asked = {where: {key: value}} if where else {key: value}
    (folder / "config.json").write_text(json.dumps(config | asked))
    for action in (load_model, rehearse_model):
        with pytest.raises(ModelError, match=rf"{key}.*org/kernel.*Remove that key"):
            action(settings(folder))


def test_a_quantized_checkpoint_is_refused(adder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(adder, folder)
    config = json.loads((folder / "config.json").read_text())
    asked = {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config | asked))
    with pytest.raises(ModelError, match=r"quantization_config \(fp8\)"):
        load_model(settings(folder))


def test_one_logit_scale_is_used_for_both_names(tmp_path: Path) -> None:
    write_checkpoint(BY_NAME["granite"], tmp_path)
    assert load_model(settings(tmp_path)).get_output_embeddings().logit_scale == 1 / 8.0
    write_checkpoint(BY_NAME["cohere"], tmp_path)
    assert load_model(settings(tmp_path)).get_output_embeddings().logit_scale == 0.25
