"""The hook of the site: links that leave docs/ lead to copies of the files. .ci/docs builds the site."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="needs the extra `docs`")


@pytest.fixture(scope="module")
def hook(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hook", root / ".ci" / "site_hook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_site(hook: ModuleType, uri: str, text: str) -> str:
    return hook.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri=uri)))


@pytest.mark.parametrize(
    ("uri", "link", "there"),
    [
        ("index.md", "magic.md#a", "magic.md#a"),
        ("index.md", "../or1/trainer.py", "source/or1/trainer.py.md"),
        ("index.md", "../benchmarks/README.md#b", "source/benchmarks/README.md#b"),
        ("index.md", "../kernels", "source/kernels/README.md"),
        ("index.md", "../examples/integrations", "source/examples/integrations.md"),
        ("index.md", "https://example.org/x", "https://example.org/x"),
        ("source/kernels/README.md", "../docs/magic.md", "../../magic.md"),
        ("source/kernels/README.md", "or1_kernels/reference.py", "or1_kernels/reference.py.md"),
    ],
)
def test_links_lead_to_files_of_the_site(hook: ModuleType, uri: str, link: str, there: str) -> None:
    assert in_site(hook, uri, f"[x]({link})") == f"[x]({there})"


def test_a_damaged_link_out_of_docs_is_an_error(hook: ModuleType) -> None:
    with pytest.raises(Exception, match=r"docs/index.md links to \.\./or1/nothing.py"):
        in_site(hook, "index.md", "[x](../or1/nothing.py)")


def test_escaped_pipes_in_the_code_of_a_table_are_plain(hook: ModuleType) -> None:
    text = "| `a\\|b` | c\\|d |\n\nnot `a\\|b`"
    assert in_site(hook, "index.md", text) == "| `a|b` | c\\|d |\n\nnot `a\\|b`"
