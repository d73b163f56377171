"""README stays true: its code runs, its commands parse, the files it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from or1.cli import _parser


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(readme: str) -> None:
    # Those of the integrations run in tests/integrations/test_readme.py, with the libraries they need.
    blocks = [b for b in re.findall(r"```python\n(.*?)```", readme, flags=re.S) if "or1.integrations" not in b]
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
        arguments = _parser().parse_args(command.split())
        assert (root / arguments.config).is_file()
    verbs = set(re.findall(r"`or1 (\w+)", readme))
    assert {"train", "eval", "filter", "report", "export"} <= verbs
    for verb in verbs:
        with pytest.raises(SystemExit) as done:
            _parser().parse_args([verb, "--help"])
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
