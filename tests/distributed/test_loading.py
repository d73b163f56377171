"""One rank reads the model, all get its bits, and none but that one ever has it whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.architectures.cases import CASES
from benchmarks.architectures.check import write_checkpoint
from or1.config import ModelConfig
from or1.model.load import load_model
from tests.helpers import dist_work
from tests.helpers.ranks import or1_ranks, run_ranks
from tests.helpers.small_run import arguments, lines


@pytest.mark.parametrize(
    ("size", "dtype", "name"),
    [
        (2, "float32", "adder"),
        pytest.param(4, "bfloat16", "untied", marks=pytest.mark.slow),
        pytest.param(2, "float64", "untied", marks=pytest.mark.slow),
    ],
)
def test_every_rank_has_the_bits_of_the_checkpoint(
    size: int, dtype: str, name: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(name)
    model = load_model(ModelConfig(path=str(path), dtype=dtype, device="cpu"))
    want = {n: dist_work.whole(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    assert any("inv_freq" in name for name in want)
    for found in run_ranks(dist_work.loaded, size, path, dtype):
        assert found.keys() == want.keys()
        assert all(np.array_equal(found[n], value) for n, value in want.items())


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["tensor", pytest.param("architecture", marks=pytest.mark.slow)])
def test_a_model_that_only_the_main_rank_rejects_is_one_line_of_all(fault: str, adder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adder, tmp_path / "model"))
    if fault == "tensor":
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        write_checkpoint(next(case for case in CASES if case.name == "bloom"), folder)
    log = tmp_path / "log"
    assert or1_ranks(2, arguments(tmp_path / "run", model__path=folder), log) == [70, 70]
    said = "".join(file.read_text() for file in tmp_path.glob("log*"))
    assert "Traceback" not in said and "Stacks of" not in said
    assert ("lacks tensors of the model: model.layers.0.mlp.up_proj" if fault == "tensor" else "see each other") in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma2"))]
)
def test_layers_of_another_name_sinks_and_soft_caps_are_sharded(name: str, adder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_checkpoint(next(case for case in CASES if case.name == name), folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(adder / file, folder)
    settings = {
        "model__path": folder,
        "loss__reject_zero_advantage": "false",
        "stage__0__steps": 1,
        "stage__1__steps": 1,
        "loss__advantage_std": "false",
    }
    assert or1_ranks(2, arguments(tmp_path / "run", **settings), tmp_path / "log") == [0, 0]
    assert all(line["mismatch/kl"] < 1e-9 for line in lines(tmp_path / "run") if line["step"])


@pytest.mark.slow
def test_only_the_main_rank_ever_has_the_whole_model_in_memory(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=4000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        head_dim=128,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    main, *others = run_ranks(dist_work.memory_of_loading, 4, tmp_path)
    print(
        f"the model has {size / 2**20:.0f} MiB; loading takes {main / 2**20:.0f} on the main rank and "
        f"{max(others) / 2**20:.0f} on the others"
    )
    assert main > size
    # Their shard is a quarter.
    assert max(others) < 0.6 * size
