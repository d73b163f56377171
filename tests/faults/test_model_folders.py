"""A model folder that names pickled weights or files elsewhere, or holds JSON that nobody can read, is one line."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from or1.cli import main
from or1.config import ModelConfig
from or1.model.load import ModelError, load_model, load_tokenizer
from tests.helpers.small_run import arguments

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(adder: Path, tmp_path: Path) -> Path:
    """Write the example checkpoint in two shards, with an index."""
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


@pytest.fixture
def whole(adder: Path, tmp_path: Path) -> Path:
    """Write the example checkpoint in one file."""
    return Path(shutil.copytree(adder, tmp_path / "whole"))


def change(folder: Path, changed: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Do something to the weights of a folder."""
    weights = load_file(folder / "model.safetensors")
    changed(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> torch.nn.Module:
    return load_model(ModelConfig(path=str(folder), device="cpu", dtype="float32"))


def test_shards_beside_their_index_are_read(folder: Path, adder: Path) -> None:
    found, want = load(folder), load_model(ModelConfig(path=str(adder), device="cpu", dtype="float32"))
    assert all(a.equal(b) for a, b in zip(found.parameters(), want.parameters(), strict=True))


@pytest.mark.parametrize("index", [INDEX, "sub/other.safetensors.index.json"])
@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\b.safetensors", 7],
)
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


DOWN = "model.layers.0.mlp.down_proj.weight"


def spoiled(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda w: w[DOWN].view(-1)[7].fill_(value)


WRONG = {
    "missing": (lambda w: w.pop(DOWN), rf"lacks tensors of the model: {re.escape(DOWN)}; they would be random"),
    "many": (lambda w: [w.pop(n) for n in list(w) if "mlp" in n], r"mlp.*, .*mlp.*, .*mlp.* and 6 more;"),
    "renamed": (lambda w: w.update({"x.weight": w.pop(DOWN)}), rf"{re.escape(DOWN)}; it has unknown ones, such as x\."),
    "empty": (lambda w: (w.clear(), w.update(x=torch.zeros(2))), r"lacks tensors.* and \d+ more; .*such as x"),
    "shape": (lambda w: w.update({DOWN: w[DOWN].T.contiguous()}), r"\[344, 128\] in the file, \[128, 344\]"),
    "integer": (lambda w: w.update({DOWN: w[DOWN].to(torch.int32)}), rf"type I32: {re.escape(DOWN)} in model.saf"),
    "bytes": (lambda w: w.update({DOWN: w[DOWN].to(torch.uint8)}), r"type U8.*floating-point"),
    "nan": (spoiled(math.nan), rf"NaN or infinite.*{re.escape(DOWN)}"),
    "inf": (spoiled(-math.inf), rf"NaN or infinite.*{re.escape(DOWN)}"),
}


@pytest.mark.parametrize("what", WRONG)
def test_every_tensor_of_the_model_comes_from_its_folder(what: str, whole: Path) -> None:
    how, message = WRONG[what]
    change(whole, how)
    with pytest.raises(ModelError, match=message) as caught:
        load(whole)
    assert str(whole) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tied_head_may_be_absent_and_an_unused_tensor_present(whole: Path) -> None:
    assert "lm_head.weight" not in load_file(whole / "model.safetensors")
    change(whole, lambda w: w.update({"model.layers.9.rotary.counts": torch.zeros(3, dtype=torch.int64)}))
    load(whole)
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"lacks tensors of the model: lm_head\.weight"):
        load(whole)


def test_only_the_file_that_is_read_is_looked_at(whole: Path) -> None:
    save_file({"x": torch.zeros(2, dtype=torch.int32)}, whole / "consolidated.safetensors")
    load(whole)


@pytest.mark.parametrize("verb", ["train", "eval", "export", "reference", "doctor"])
def test_every_command_refuses_a_folder_that_lacks_a_tensor(
    verb: str, whole: Path, adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    lacking = {"model__path": whole}
    if verb == "export":
        assert main(arguments(run, **lacking, stage__0__steps=1, stage__1__steps=1)) == 0
    change(whole, lambda w: w.pop(DOWN))
    if verb == "reference":
        lacking = {"loss__kl_coef": 0.01, "loss__reference": whole}
    words = {"export": ["export", str(run)]}.get(verb) or arguments(run, **lacking)
    if verb in ("eval", "doctor"):
        sets = f'eval.sets=[{{name="a",path="{adder}/heldout.jsonl",limit=2}}]'
        words = [verb, *words[1:], "--set", sets]
    if verb == "eval":
        words = [*words, "--out", str(tmp_path / "out")]
    assert main(words) == 70
    said = "".join(capsys.readouterr())
    assert f"lacks tensors of the model: {DOWN}" in said and "Traceback" not in said
