"""`or1 eval` and `or1 filter` as a person runs them: killed halfway, gone on with, on a run, on AIME prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from or1.cli import main
from tests.helpers.ranks import start_or1

RECIPE = """
run_dir = "{run_dir}"
[model]
path = "{model}"
dtype = "float32"
device = "cpu"
[data]
train = {train}
max_prompt_tokens = 2048
[rollout]
batch_size = {batch}
[reward]
workers = 1
[eval]
max_response_tokens = {limit}
[filter]
samples = 4
max_response_tokens = {limit}
{sets}
"""


def write_recipe(folder: Path, name: str, model: Path, files: Sequence[Path], *, batch: int, limit: int) -> Path:
    """Write a recipe that evaluates and filters with the same files, four samples each."""
    sets = "".join(f'[[eval.sets]]\nname = "{f.stem}"\npath = "{f}"\nsamples = 4\n' for f in files)
    path = folder / f"{name}.toml"
    train = json.dumps([str(f) for f in files])
    path.write_text(RECIPE.format(run_dir=folder / name, model=model, train=train, batch=batch, limit=limit, sets=sets))
    return path


def kill_when_half_done(root: Path, arguments: Sequence[str], parts: Path, at_least: int) -> int:
    """Run until some parts stand, then SIGKILL. Returns how many do."""
    log = parts.parents[1] / "killed.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    process = start_or1(arguments, root, log)
    deadline = time.monotonic() + 150
    while len(list(parts.rglob("part_*.parquet"))) < at_least:
        assert process.is_alive(), f"ended early:\n{Path(f'{log}.err').read_text()}"
        assert time.monotonic() < deadline, "no part within 150 s"
        time.sleep(0.01)
    process.kill()
    process.join()
    return len(list(parts.rglob("part_*.parquet")))


def check_eval(root: Path, straight: Path, killed: Path, files: Sequence[Path], samples: int) -> None:
    """Compare the transcripts of a killed and resumed evaluation with those of an undisturbed one."""
    parts = killed.with_suffix("") / "eval" / killed.stem / "parts"
    stood = kill_when_half_done(root, ["eval", str(killed)], parts, 2)
    assert not (parts.parent / "eval.json").exists(), "it was done before it was killed"
    # In this process, which has imported everything already; only what is killed needs one of its own.
    assert main(["eval", str(killed)]) == 0 and main(["eval", str(straight)]) == 0
    assert stood >= 2
    for file in files:
        tables = [
            pq.read_table(recipe.with_suffix("") / "eval" / recipe.stem / "transcripts" / f"{file.stem}.parquet")
            for recipe in (straight, killed)
        ]
        keys = list(zip(*(tables[1][name].to_pylist() for name in ("prompt_id", "sample")), strict=True))
        assert len(set(keys)) == len(keys) == samples
        assert tables[0].equals(tables[1])


def check_filter(root: Path, straight: Path, killed: Path, prompts: int) -> list[dict]:
    """Compare the difficulty file of a killed and resumed filter with that of an undisturbed one."""
    parts = killed.with_suffix("") / "difficulty.parquet.parts"
    kill_when_half_done(root, ["filter", str(killed)], parts, 2)
    assert not (killed.with_suffix("") / "difficulty.parquet").exists(), "it was done before it was killed"
    assert main(["filter", str(killed)]) == 0 and main(["filter", str(straight)]) == 0
    tables = [pq.read_table(recipe.with_suffix("") / "difficulty.parquet") for recipe in (straight, killed)]
    assert tables[0].equals(tables[1])
    rows = tables[1].to_pylist()
    assert len({row["prompt_id"] for row in rows}) == len(rows) == prompts
    return rows


@pytest.fixture
def sums(adder: Path, tmp_path: Path) -> Path:
    """Return the first problems of the example."""
    path = tmp_path / "sums.jsonl"
    path.write_bytes(b"".join((adder / "heldout.jsonl").read_bytes().splitlines(keepends=True)[:96]))
    return path


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(root: Path, adder: Path, sums: Path, tmp_path: Path) -> None:
    recipes = [write_recipe(tmp_path, name, adder, [sums], batch=16, limit=40) for name in ("straight", "killed")]
    check_eval(root, *recipes, [sums], 4 * 96)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_filter_goes_on_and_its_file_chooses_prompts(
    root: Path, adder: Path, sums: Path, quick_or1: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = [write_recipe(tmp_path, name, adder, [sums], batch=16, limit=40) for name in ("straight", "killed")]
    rows = check_filter(root, *recipes, 96)
    assert "keep_difficulty = [1, 3] keeps" in capsys.readouterr().out
    kept = sum(1 <= row["passes"] <= 3 for row in rows)
    assert 0 < kept < 96 and all(row["pass_rate"] == row["passes"] / 4 for row in rows)
    settings = [
        f'data.train="{sums}"',
        "data.keep_difficulty=[1, 3]",
        f"run_dir={tmp_path / 'run'}",
        "eval.sets=[]",
        f'data.difficulty_file="{tmp_path / "killed" / "difficulty.parquet"}"',
        "log.tensorboard=false",
        "stage.0.steps=1",
        "stage.1.steps=1",
        "stage.0.group_size=2",
        "stage.1.group_size=2",
        "stage.0.prompts_per_step=4",
        "stage.1.prompts_per_step=4",
    ]
    trained = quick_or1("train", "examples/quickstart.toml", *(part for s in settings for part in ("--set", s)))
    assert trained.returncode == 0, trained.stderr
    assert f"{kept} kept, 0 over-long" in trained.stdout and "too easy" in trained.stdout
    of_run = ["eval", str(tmp_path / "run"), "--config", str(recipes[0]), "--set"]
    assert main([*of_run, "eval.sets.0.limit=8"]) == 0
    assert (tmp_path / "run" / "eval" / "step_2-straight" / "eval.json").is_file()
    assert main([*of_run, "eval.sets.0.limit=9"]) == 70
    assert "other settings (problems)" in capsys.readouterr().err


# --- AIME prompts


def make_random_model(folder: Path) -> Path:
    """Save a Qwen2 of random weights with one token per byte and a chat template."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<eos>"])}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '\\n' }}"
    tokenizer.save_pretrained(folder)
    shape = Qwen2Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        eos_token_id=256,
        pad_token_id=256,
    )
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("verb", ["eval", "filter"])
def test_aime_with_a_random_model_is_killed_and_goes_on(root: Path, tmp_path: Path, verb: str) -> None:
    files = [root.parent / "shared" / "data" / f"aime{year}.parquet" for year in (24, 25)]
    if not all(file.exists() for file in files):
        pytest.skip("no aime24.parquet, aime25.parquet: this test reads them from shared/data beside the repository")
    model = make_random_model(tmp_path / "model")
    recipes = [write_recipe(tmp_path, name, model, files, batch=12, limit=24) for name in ("straight", "killed")]
    if verb == "eval":
        check_eval(root, *recipes, files, 4 * 30)
    else:
        check_filter(root, *recipes, 60)
