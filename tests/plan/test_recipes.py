"""Every recipe is planned and read; those for a real model on few GPUs say what their pages say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from or1.cli import main
from or1.config import Config
from or1.config.load import load_config
from or1.config.published import PUBLISHED
from or1.config.section import each_of
from or1.plan.devices import find_device
from or1.plan.estimate import make_plan
from or1.plan.shapes import shape_of
from tests.helpers.hub import parquet_of

# Smallest machine that the first lines of a recipe, or its page, name.
MACHINES = {"gsm8k-1gpu": ("RTX-4090", 1), "justrl-1.5b": ("H100", 8), "magic-1.5b": ("H100", 8)}
LARGER = (
    'model.path="Qwen/Qwen2.5-1.5B-Instruct"',
    'optim.optimizer="adamw8bit"',
    'optim.weights="stochastic"',
    "optim.max_tokens_per_rank=8192",
    "rollout.vllm.gpu_memory=0.35",
)
"""What docs/gsm8k.md gives for the 1.5B model on 24 GB."""


def recipe(root: Path, name: str, *overrides: str) -> Config:
    return load_config(root / "examples" / "recipes" / f"{name}.toml", overrides, files=False)


@pytest.mark.parametrize(("name", "overrides"), [*((name, ()) for name in MACHINES), ("gsm8k-1gpu", LARGER)])
def test_a_recipe_fits_its_smallest_machine(name: str, overrides: tuple[str, ...], root: Path) -> None:
    device, gpus = MACHINES[name]
    config = recipe(root, name, *overrides)
    plan = make_plan(config, shape_of(config.model.path), find_device(device, "auto")[0], gpus=gpus)
    assert plan.fits
    assert plan.longest <= config.optim.max_tokens_per_rank <= plan.largest_tokens


def test_the_pages_have_the_planned_numbers(root: Path) -> None:
    page = (root / "docs" / "gsm8k.md").read_text()
    rows = re.findall(
        r"^\| (0.5B|1.5B)[^|]*\| (RTX 4090|L40S|A100|H100), \d+ GB \| ([\d.]+) \| ([\d.]+) s \|", page, re.M
    )
    assert len(rows) == 8
    for model, device, gib, seconds in rows:
        overrides = () if model == "0.5B" else LARGER if device == "RTX 4090" else LARGER[:1]
        config = recipe(root, "gsm8k-1gpu", *overrides)
        found = find_device(device.replace(" ", "-"), "auto")[0]
        plan = make_plan(config, shape_of(config.model.path), found, mean_response=300)
        (stage,) = plan.stages
        assert stage.memory.peak.total / 2**30 == pytest.approx(float(gib), abs=0.06)
        assert stage.time.total == pytest.approx(float(seconds), rel=0.03)


def test_the_two_recipes_of_1_5b_differ_in_the_recipe_only(root: Path) -> None:
    justrl, magic = recipe(root, "justrl-1.5b"), recipe(root, "magic-1.5b")
    for name in ("model", "rollout", "reward", "eval", "dist", "checkpoint"):
        assert getattr(justrl, name) == getattr(magic, name), name
    assert justrl.data.model_copy(update={"drop_solved": True}) == magic.data
    assert [_responses(config) for config in (justrl, magic)] == [4380 * 2048] * 2
    assert {s.prompts_per_step * s.group_size for s in (*justrl.stage, *magic.stage)} == {2048}
    assert justrl.stage[-1].max_response_tokens == magic.stage[-1].max_response_tokens == 15360


def test_justrl_has_the_published_settings(root: Path) -> None:
    config = recipe(root, "justrl-1.5b")
    (stage,) = config.stage
    assert (stage.steps, stage.prompts_per_step, stage.group_size, stage.minibatch_prompts) == (4380, 256, 8, 64)
    loss, optim = config.loss, config.optim
    assert (loss.clip_low, loss.clip_high, loss.kl_coef, loss.entropy.control) == (0.2, 0.28, 0.0, "none")
    assert not loss.reject_zero_advantage and loss.refill_rounds == 0 and loss.normaliser == "token"
    assert (optim.lr, optim.weight_decay, optim.grad_clip, config.rollout.temperature) == (1e-6, 0.1, 1.0, 1.0)
    assert config.data.keep_difficulty is None and config.data.prompt_suffix.startswith(
        "\n\nPlease reason step by step,"
    )


def test_every_file_of_a_recipe_is_one_of_or1_data(root: Path) -> None:
    written = {f"data/{made.file}" for published in PUBLISHED.values() for made in published.files}
    # docs/data.md gives these two as links.
    written |= {"data/or1_32b_math.parquet", "data/or1_32b_code.parquet"}
    for path in sorted((root / "examples" / "recipes").glob("*.toml")):
        assert {
            name
            for name in _files(load_config(path, verb="eval" if "eval-" in path.name else "train", files=False))
            if name.startswith("data/")
        } <= written, path


@pytest.mark.parametrize("name", MACHINES)
def test_a_recipe_passes_a_dry_run_on_a_small_model(
    name: str, root: Path, adder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The toy model with the positions of a large one: the dry run reads limits, tokenizer and data, no weights.
    shutil.copytree(adder, "model")
    shape = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(shape | {"max_position_embeddings": 65536}))
    Path("data").mkdir()
    for number, file in enumerate(sorted(set(_files(recipe(root, name))))):
        rows = [{"question": f"{number}+{n}=", "answer": f"{number + n}"} for n in range(3)]
        text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
        Path(file).write_bytes(parquet_of(rows) if file.endswith(".parquet") else text)
    # The toy's tokenizer has no letters.
    here = {"model.path": "model", "model.device": "cpu", "rollout.engine": "hf", "data.prompt_suffix": "''"}
    overrides = [part for key, value in here.items() for part in ("--set", f"{key}={value}")]
    assert main(["train", str(root / "examples" / "recipes" / f"{name}.toml"), "--dry-run", *overrides]) == 0
    assert not Path("runs").exists()


def _files(config: Config) -> Iterator[str]:
    yield from map(str, config.data.files)
    for each in config.eval.sets:
        yield from map(str, each_of(each.path))


def _responses(config: Config) -> int:
    return sum(stage.steps * stage.prompts_per_step * stage.group_size for stage in config.stage)
