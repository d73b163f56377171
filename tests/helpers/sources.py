"""Sources of the repository, each read and parsed once in a process."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path


@cache
def text_of(path: Path) -> str:
    """Return the text of a source file."""
    return path.read_text(encoding="utf-8")


@cache
def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of a source file. All tests share the tree: never change it."""
    return ast.parse(text_of(path))


@cache
def sources(root: Path, *folders: str) -> tuple[Path, ...]:
    """Return the Python files under these folders of the repository."""
    return tuple(path for folder in folders for path in sorted((root / folder).rglob("*.py")))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Return every node of the syntax tree of a source file."""
    return tuple(ast.walk(tree_of(path)))
