"""Folders, patterns and dataset names in a config."""

from __future__ import annotations

from pathlib import Path

import pytest

from or1.config.changes import changed_keys
from or1.config.data_paths import Dataset, dataset_of, expanded
from or1.config.load import dump_config, load_config
from or1.data import load_prompts

ROW = '{"question": "1+1=", "answer": "2"}\n'


def made(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW)
    return [str(folder / name) for name in names]


def test_a_folder_is_its_data_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    b, a, *_ = made(tmp_path, "b.jsonl", "a.csv", "README.md", ".hidden.jsonl", "deep/c.jsonl", "config.schema.json")
    assert expanded(str(tmp_path), []) == (a, b)
    assert expanded((str(tmp_path), b), []) == (a, b, b), "a file named twice counts twice"


def test_a_pattern_is_its_files_and_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    a, deep, odd = made(tmp_path, "a.jsonl", "deep/c.jsonl", "x[1].jsonl")
    assert expanded(str(tmp_path / "**" / "*.jsonl"), []) == (a, deep, odd)
    assert expanded(odd, []) == odd and expanded(str(tmp_path / "no*"), []) == str(tmp_path / "no*")
    assert expanded("deep/*.jsonl", [tmp_path]) == deep, "relative to the folder of the config"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf:openai/gsm8k:main/train", Dataset("openai/gsm8k", None, "main", "train", "")),
        ("hf:a/b-c.d:train", Dataset("a/b-c.d", None, "default", "train", "")),
        ("hf:a/b@refs/pr/1:c/test", Dataset("a/b", "refs/pr/1", "c", "test", "")),
        ("hf:a/b/data/x.jsonl", Dataset("a/b", None, "default", "", "data/x.jsonl")),
        ("hf:a/b@0f1e:train", Dataset("a/b", "0f1e", "default", "train", "")),
        ("hf:a/b", None),
        ("hf:gsm8k:train", None),
        ("a/b:train", None),
    ],
)
def test_names_of_datasets(name: str, parts: Dataset | None) -> None:
    assert dataset_of(name) == parts


def test_the_resolved_config_names_the_files(tmp_path: Path, root: Path) -> None:
    a, b = made(tmp_path, "a.jsonl", "b.jsonl")
    sets = f'[{{name="held", path="{tmp_path}/*.jsonl"}}]'
    settings = [f"data.train={tmp_path}", f"eval.sets={sets}", f"run_dir={tmp_path}/run"]
    config = load_config(root / "examples" / "quickstart.toml", settings)
    assert config.data.train == config.data.files == (a, b) and config.eval.sets[0].path == (a, b)
    (tmp_path / "config.resolved.json").write_text(dump_config(config))
    assert load_config(tmp_path / "config.resolved.json") == config


def test_a_run_of_an_older_version_goes_on(root: Path) -> None:
    """Its config has neither the new table nor the new keys; they count as their defaults."""
    new = load_config(root / "examples" / "quickstart.toml").model_dump(mode="json")
    added = ("columns", "system_prompt", "chat_template")
    old = {**new, "data": {key: value for key, value in new["data"].items() if key not in added}}
    old["reward"] = {key: value for key, value in new["reward"].items() if key != "parts"}
    assert changed_keys(old, new) == []
    new["data"]["columns"]["prompt"] = "q"
    assert changed_keys(old, new) == ["data.columns"]


def test_the_parts_of_a_mixture_may_have_several_files(tmp_path: Path, root: Path) -> None:
    from or1.data.problems import load_problems
    from tests.helpers.problem_files import make_tokenizer

    made(tmp_path, "code/a.jsonl", "code/b.jsonl", "math.jsonl")
    (tmp_path / "code" / "b.jsonl").write_text(ROW * 3)
    mix = f'[{{path="{tmp_path}/code", weight=2}}, {{path="{tmp_path}/math.jsonl", weight=1}}]'
    settings = [f"data.mix={mix}", "data.train=[]", "eval.sets=[]", f"run_dir={tmp_path}/r"]
    config = load_config(root / "examples" / "quickstart.toml", settings)
    pools = load_problems(config, make_tokenizer()).pools
    assert [(pool.start, pool.size, pool.weight) for pool in pools] == [(0, 1, 0.5), (1, 3, 1.5), (4, 1, 1.0)]


def test_two_files_of_one_name_have_different_ids(tmp_path: Path) -> None:
    paths = made(tmp_path, "x/a.jsonl", "y/a.jsonl")
    assert [p.id for p in load_prompts(paths, None, max_prompt_tokens=9).prompts] == [f"{path}:1" for path in paths]
