"""README stays true: its code runs, its commands parse, the files it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from or1.cli import make_parser
from or1.reward import custom


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def python_blocks(readme: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme, flags=re.S)


def test_the_reward_function_is_one(readme: str, tmp_path: Path) -> None:
    (block,) = [b for b in python_blocks(readme) if "def reward" in b]
    (tmp_path / "my_reward.py").write_text(block)
    custom.begin({"path": f"{tmp_path}/my_reward.py:reward"})

    def paid(completion: str) -> float:
        job = {"prompt": "6 * 7 =", "completion": completion, "completion_ids": [1]}
        return custom.grade_job(job | {"row": {"prompt": "6 * 7 =", "answer": "42", "level": 3}}).reward

    assert [paid(text) for text in ("so it is 42", "42 or 43", "?")] == [1.0, 0.1, 0.0]


def test_the_forms_of_reward_functions_are_all_named(readme: str) -> None:
    for form, parameters in custom._SIGNS:
        named = " and ".join(f"`{name}`" for name in sorted(parameters, key=("prompt", *parameters).index))
        assert f"\n| {named} | " in readme, form


def test_python_blocks_run(readme: str) -> None:
    # Those of the integrations run in tests/integrations/test_readme.py, with the libraries they need.
    blocks = [b for b in python_blocks(readme) if "or1.integrations" not in b and "def reward" not in b]
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), names)
        if "linear_policy_loss" in block:
            names["loss"].backward()
            assert names["hidden"].grad.abs().sum() > 0 and names["logp"].shape == names["targets"].shape


def test_commands_parse_and_examples_exist(readme: str, root: Path) -> None:
    commands = re.findall(r"^    .*?\bor1 (train [\w./]+)", readme, flags=re.M)
    assert commands
    for command in commands:
        arguments = make_parser().parse_args(command.split())
        assert (root / arguments.config).is_file()
    verbs = set(re.findall(r"`or1 (\w+)", readme))
    assert {"train", "eval", "filter", "report", "export"} <= verbs
    for verb in verbs:
        with pytest.raises(SystemExit) as done:
            make_parser().parse_args([verb, "--help"])
        assert done.value.code == 0, verb


def test_named_files_exist(readme: str, root: Path) -> None:
    named = set(re.findall(r"(?:or1|kernels|tests|examples|csrc|benchmarks)/[\w./-]*\w", readme))
    assert len(named) > 15
    missing = [name for name in named if not (root / name).exists()]
    assert not missing


def test_ci_runs_the_test_command_of_the_readme(readme: str, root: Path) -> None:
    command = 'pip install -e ".[test]" && pytest'
    assert f"    {command}\n" in readme
    assert r'pip install -e "\.\[test\]" && pytest' in (root / ".ci" / "run").read_text()
