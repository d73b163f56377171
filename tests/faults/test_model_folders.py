"""A model folder that names pickled weights or files elsewhere, or holds JSON that nobody can read, is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import arguments

from or1.cli import main
from or1.config import ModelConfig
from or1.model import ModelError, load_model, load_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(adder: Path, tmp_path: Path) -> Path:
    """The example checkpoint in two shards, with an index."""
    made = tmp_path / "model"
    shutil.copytree(adder, made)
    weights = load_file(made / "model.safetensors")
    (made / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, made / file, metadata={"format": "pt"})
    of = {name: file for file, held in shards.items() for name in held}
    (made / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": of}))
    return made


def load(folder: Path) -> torch.nn.Module:
    return load_model(ModelConfig(path=str(folder), device="cpu", dtype="float32"))


def test_shards_beside_their_index_are_read(folder: Path, adder: Path) -> None:
    found, want = load(folder), load_model(ModelConfig(path=str(adder), device="cpu", dtype="float32"))
    assert all(a.equal(b) for a, b in zip(found.parameters(), want.parameters(), strict=True))


@pytest.mark.parametrize("index", [INDEX, "sub/other.safetensors.index.json"])
@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\b.safetensors", 7],
)  # fmt: skip
def test_an_index_leads_to_safetensors_beside_it_only(name: object, index: str, folder: Path) -> None:
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    first = sorted(listed)[0]
    weights = load_file(folder / listed[first])
    # What is named is there, and is all that transformers asks for.
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "sub").mkdir()
    save_file(weights, folder.parent / "outside.safetensors", metadata={"format": "pt"})
    save_file(weights, folder / "sub" / "x.safetensors", metadata={"format": "pt"})
    listed[first] = name
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    if index != INDEX:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": index}))
    with pytest.raises(ModelError, match=r"takes weights from|does not say which file") as caught:
        load(folder)
    assert index in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "[]", "{}", '{"weight_map": []}', "\udcff"])
def test_an_index_that_is_none_is_one_line(text: str, folder: Path) -> None:
    (folder / INDEX).write_text(text, errors="surrogateescape")
    with pytest.raises(ModelError, match="does not say which file holds which weight"):
        load(folder)


def test_a_config_that_names_pickled_weights_is_refused(folder: Path) -> None:
    weights: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    torch.save(weights, folder / "adapter_model.bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    with pytest.raises(ModelError, match="transformers_weights"):
        load(folder)


def test_the_index_of_a_hub_id_is_looked_at_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("a" * 40))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load(Path("some/model")).config.model_type
    index = cached / "snapshots" / ("a" * 40) / INDEX
    index.write_text(index.read_text().replace("model-1.safetensors", "model-1.bin"))
    with pytest.raises(ModelError, match=r"takes weights from 'model-1.bin'"):
        load(Path("some/model"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model-1.safetensors"])
@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "[]", "7", "{", '{"added_tokens_decoder": 3}'])
def test_files_that_cannot_be_read_are_one_line(
    name: str, text: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (folder / name).exists():
        pytest.skip(f"the example has no {name}")
    (folder / name).write_text(text)
    try:
        if name.endswith("safetensors"):
            load(folder)
        else:
            load_tokenizer(str(folder))
    except ModelError as error:
        assert str(error).startswith(f"the model {str(folder)!r}, a folder here, cannot be read: ")
    if name == "config.json":
        assert main(arguments(tmp_path / "run", "--dry-run", model__path=folder)) in (0, 2, 70)
        assert "Traceback" not in capsys.readouterr().err
