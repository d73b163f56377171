"""House limits that a machine can check."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import sources as files
from tests.helpers.sources import nodes_of, text_of, tree_of

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_POSITIONAL = 400, 60, 6
# Sources that are sent into sandboxes, where running what they are given is their work.
SANDBOXED = ("or1/reward/code/inside/runner.py", "or1/reward/code/inside/checker.py")
FORBIDDEN = ("pickle", "torch.load", "eval(", "exec(", "trust_remote_code=True", "weights_only=False")


def sources(root: Path) -> tuple[Path, ...]:
    return files.sources(root, "or1", "kernels", "benchmarks", "examples")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in nodes_of(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_triton_kernel(node: ast.AST) -> bool:
    return any("jit" in ast.unparse(d) for d in node.decorator_list)


def test_files_and_functions_are_short(root: Path) -> None:
    long = [f"{p.name}: {n} lines" for p in sources(root) if (n := len(text_of(p).splitlines())) > MAX_FILE_LINES]
    for path in sources(root):
        for f in functions(path):
            lines = f.end_lineno - f.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                long.append(f"{path.name}:{f.name}: {lines} lines")
            positional = [a for a in f.args.posonlyargs + f.args.args if a.arg not in ("self", "cls", "ctx")]
            if len(positional) > MAX_POSITIONAL and not is_triton_kernel(f):
                long.append(f"{path.name}:{f.name}: {len(positional)} positional arguments")
    assert not long


def test_nothing_unpickles_or_runs_what_it_reads(root: Path) -> None:
    def code_of(path: Path) -> str:
        # Strings and comments may speak of what the code must not do.
        tree = ast.parse(text_of(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""
        return ast.unparse(tree).replace(".eval(", "")

    trusted = [p for p in sources(root) if p.relative_to(root).as_posix() not in SANDBOXED]
    # Most files hold none of the words even in their strings, so their syntax need not be looked at.
    suspects = [(p, word) for p in trusted for word in FORBIDDEN if word in text_of(p)]
    found = [f"{p.name}: {word}" for p, word in suspects if word in code_of(p)]
    assert not found


def test_public_names_have_docstrings(root: Path) -> None:
    missing = []
    for path in sources(root):
        tree = tree_of(path)
        if path.name != "__init__.py" and not ast.get_docstring(tree):
            missing.append(f"{path.name}: module")
        public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
        # A Triton kernel is compiled from its source, so it is described by a comment above it.
        missing += [f"{path.name}: {n.name}" for n in public if not ast.get_docstring(n) and not is_triton_kernel(n)]
    assert not missing


@pytest.mark.parametrize("pattern", ["bare except", "ascii comments"])
def test_catching_is_narrow_and_comments_are_ascii(pattern: str, root: Path) -> None:
    for path in sources(root):
        text = text_of(path)
        if pattern == "ascii comments":
            assert text.isascii(), f"{path.name} has characters beyond ASCII"
            continue
        for node in nodes_of(path):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path.name}:{node.lineno}: bare except"
