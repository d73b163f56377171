"""CHANGELOG, CONTRIBUTING, SECURITY, CITATION.cff, kernels/README: files, commands, versions and snippets are real."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import or1

PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def text_of(root: Path, name: str) -> str:
    text = (root / name).read_text(encoding="utf-8")
    assert text.isascii() and len(text.splitlines()) > 20
    return text


@pytest.mark.parametrize("name", PAGES)
def test_links_and_named_files_exist(name: str, root: Path) -> None:
    text = text_of(root, name)
    links = [target for target in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in target]
    named = re.findall(r"(?:or1|kernels|tests|examples|csrc|benchmarks|docs|\.ci)/[\w./-]*\w", text)
    assert links or named
    # A path that a rule of pairs speaks of, such as or1/run/lock.py, exists too.
    assert not [path for path in [*links, *named] if not (root / path).exists()]


def test_the_snippet_on_the_kernels_page_runs(root: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", text_of(root, "kernels/README.md"), flags=re.S)
    names: dict[str, Any] = {}
    exec(compile(block, "kernels/README.md", "exec"), names)
    assert names["hidden"].grad.shape == (8, 64) and names["weight"].grad.abs().sum() > 0
    assert names["logp"].shape == names["entropy"].shape == (8,)


def test_markers_of_the_table_are_those_of_the_suite(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    known = {line.split(":")[0] for line in settings["tool"]["pytest"]["ini_options"]["markers"]}
    named = set(re.findall(r"`pytest -m (\w+)`", text_of(root, "CONTRIBUTING.md")))
    assert len(named) >= 4 and named <= known


def test_extras_that_are_named_exist(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    named = set(re.findall(r'"\.\[(\w+)\]"', text_of(root, "CONTRIBUTING.md")))
    assert named and named <= settings["project"]["optional-dependencies"].keys()


def test_the_citation_can_be_read(root: Path) -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load(text_of(root, "CITATION.cff"))
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert citation["version"] == or1.__version__ and citation["authors"] == [{"name": "The or1 authors"}]
    (report,) = citation["references"]
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert report["url"] == settings["project"]["urls"]["Paper"]


def test_the_version_is_in_the_changelog(root: Path) -> None:
    text = text_of(root, "CHANGELOG.md")
    assert "\n## [Unreleased]\n" in text
    assert f"\n{or1.__version__} will be the first release" in text or f"\n## [{or1.__version__}]" in text
