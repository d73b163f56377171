"""README and docs/ stay true: code runs, commands parse, configs load, links and named files exist; README is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from or1.cli import VERBS, make_parser
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


def test_readme_is_short(readme: str) -> None:
    assert len(readme.splitlines()) <= 150 and len(readme.split()) <= 1200


def test_the_forms_of_reward_functions_are_all_named(root: Path) -> None:
    page = (root / "docs" / "rewards.md").read_text(encoding="utf-8")
    for form, parameters in custom._SIGNS:
        named = " and ".join(f"`{name}`" for name in sorted(parameters, key=("prompt", *parameters).index))
        assert f"\n| {named} | " in page, form


def test_python_blocks_run(readme: str) -> None:
    # Those of docs/drop-in.md run in tests/integrations/test_readme.py, with the libraries they need.
    blocks = [b for b in python_blocks(readme) if "or1.integrations" not in b and "def reward" not in b]
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), names)
        if "linear_policy_loss" in block:
            names["loss"].backward()
            assert names["hidden"].grad.abs().sum() > 0 and names["logp"].shape == names["targets"].shape


def test_commands_parse_and_examples_exist(readme: str, root: Path) -> None:
    commands = re.findall(r"^    .*?\bor1 (train [\w./-]+\.toml)", readme, flags=re.M)
    assert commands
    for command in commands:
        arguments = make_parser().parse_args(command.split())
        assert (root / arguments.config).is_file()
    table = (root / "docs" / "commands.md").read_text(encoding="utf-8")
    verbs = set(re.findall(r"`or1 (\w+)", table))
    assert verbs == set(VERBS)
    for verb in verbs:
        with pytest.raises(SystemExit) as done:
            make_parser().parse_args([verb, "--help"])
        assert done.value.code == 0, verb


def test_the_task_of_the_docs_is_one(root: Path, tmp_path: Path) -> None:
    page = (root / "docs" / "own-task.md").read_text(encoding="utf-8")
    (tmp_path / "letters.py").write_text(python_blocks(page)[0])
    custom.begin({"path": f"{tmp_path}/letters.py:reward"})
    job = {"prompt": "Sort: c a b", "completion_ids": [1], "row": {"prompt": "Sort: c a b", "answer": "abc"}}
    paid = [custom.grade_job(job | {"completion": text}).reward for text in ("it is abc", "acb", "")]
    assert paid == pytest.approx([1.0, 1 / 6, 0.0])


def test_links_lead_to_files(root: Path) -> None:
    broken = []
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_every_page_is_in_the_index(root: Path) -> None:
    listed = set(re.findall(r"\]\(([\w.-]+\.md)\)", (root / "docs" / "index.md").read_text(encoding="utf-8")))
    pages = {page.name for page in (root / "docs").glob("*.md")}
    assert listed | {"index.md"} == pages
    # .ci/docs builds the site, and fails for a page that its navigation lacks.
    assert set(re.findall(r"- (?:[\w ]+: )?([\w.-]+\.md)$", (root / "mkdocs.yml").read_text(), flags=re.M)) == pages


def test_named_files_exist(readme: str, root: Path) -> None:
    readme += "".join(page.read_text(encoding="utf-8") for page in (root / "docs").glob("*.md"))
    named = set(re.findall(r"(?:or1|kernels|tests|examples|csrc|benchmarks)/[\w./-]*\w", readme))
    assert len(named) > 15
    missing = [name for name in named if not (root / name).exists() and not name.endswith("/X.py")]
    assert not missing


def test_ci_runs_the_test_command_of_the_readme(readme: str, root: Path) -> None:
    command = 'pip install -e ".[test]" && pytest'
    assert f"    {command}\n" in readme
    assert r'pip install -e "\.\[test\]" && pytest' in (root / ".ci" / "run").read_text()
