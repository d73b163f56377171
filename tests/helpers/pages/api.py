"""The page of public Python names, read from source: an import of an integration may need TRL or verl."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.helpers import public_api
from tests.helpers.pages.markdown import docstring
from tests.helpers.small_run import ROOT
from tests.helpers.sources import tree_of

Function = ast.FunctionDef | ast.AsyncFunctionDef
# Modules whose __all__ holds the public names, or whose functions and classes are public.
MODULES = ("or1", "or1_kernels", "or1.magic", *public_api.INTEGRATIONS)
# Its own module imports these at their first use.
_LAZY = {"or1.magic": "or1.magic.tensors"}
MAX_SIGNATURE = 100

_INTRODUCTION = """# Python API

Made by `python -m tests.helpers.pages`; a test holds page and docstrings equal. These names stay as they are, or change
with a note; everything else may change at any time.

Letters in brackets are dimensions: N rows or tokens, H hidden, V vocabulary, B sequences, T tokens of each, P prompts,
M responses to each, C response tokens. `f32[N]` is a float32 tensor, `i64[N]` one of int64, `[]` a tensor with one
value. Log-probs and entropies are in nats.
"""


class Public(NamedTuple):
    """A public function or class: dotted name, node, and the file that defines it."""

    name: str
    node: Function | ast.ClassDef
    path: Path


def page() -> str:
    """Return the page."""
    lines = [_INTRODUCTION]
    for module in MODULES:
        names = list(public(module))
        if not names:
            continue
        lines += [f"## {module}", "", *docstring(ast.get_docstring(tree_of(_path(module))) or ""), ""]
        for each in names:
            lines += [*_entry(each), ""]
    return "\n".join(lines).rstrip() + "\n"


def public(module: str) -> Iterator[Public]:
    """Yield the public functions and classes of a module."""
    tree = tree_of(_path(module))
    for name in _all(tree):
        found = _definition(_LAZY.get(module, module), name)
        if found is not None:
            yield Public(f"{module}.{name}", *found)
    if module in public_api.INTEGRATIONS:
        for node in tree.body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                yield Public(f"{module}.{node.name}", node, _path(module))


def methods(each: Public) -> Iterator[Public]:
    """Yield the public methods of a class, without overloads."""
    if isinstance(each.node, ast.ClassDef) and each.name not in public_api.INTERNAL:
        for node in each.node.body:
            if isinstance(node, Function) and not node.name.startswith("_") and "overload" not in _decorators(node):
                yield Public(f"{each.name}.{node.name}", node, each.path)


def _entry(each: Public) -> list[str]:
    """Return the section of a function, or of a class with its methods."""
    # A class of errors takes a message, and a TypedDict keywords only.
    is_error = isinstance(each.node, ast.ClassDef) and each.node.name.endswith("Error")
    lines = [f"### `{each.name}`", ""]
    if not is_error:
        lines += ["```py", *_signature(each.node), "```", ""]
    lines += docstring(ast.get_docstring(each.node) or "")
    for method in methods(each):
        lines += ["", f"#### `{each.node.name}.{method.node.name}`", "", "```py", *_signature(method.node), "```", ""]
        lines += docstring(ast.get_docstring(method.node) or "")
    return lines


def _signature(node: Function | ast.ClassDef) -> list[str]:
    """Return name, parameters with annotations and defaults, and result, a parameter a line if one line is too long."""
    returns = ""
    if isinstance(node, ast.ClassDef):
        init = next((item for item in node.body if isinstance(item, Function) and item.name == "__init__"), None)
        fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
        parts = fields if init is None else _parameters(init)
    else:
        if "property" in _decorators(node):
            return [f"{node.name}: {ast.unparse(node.returns)}" if node.returns else node.name]
        parts = _parameters(node)
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({', '.join(parts)}){returns}"
    if len(line) <= MAX_SIGNATURE:
        return [line]
    return [f"{node.name}(", *(f"    {part}," for part in parts), f"){returns}"]


def _parameters(node: Function) -> list[str]:
    """Return the parameters as text, without self and cls."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [*([None] * (len(positional) - len(given.defaults))), *given.defaults]
    parts = [_parameter(*pair) for pair in zip(positional, defaults, strict=True)]
    if given.vararg or given.kwonlyargs:
        parts.append(f"*{ast.unparse(given.vararg)}" if given.vararg else "*")
    parts += [_parameter(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        parts.append(f"**{ast.unparse(given.kwarg)}")
    return parts[1:] if positional and positional[0].arg in ("self", "cls") else parts


def _parameter(parameter: ast.arg, default: ast.expr | None) -> str:
    equals = " = " if parameter.annotation else "="
    return ast.unparse(parameter) + (f"{equals}{ast.unparse(default)}" if default else "")


def _decorators(node: Function) -> set[str]:
    return {ast.unparse(decorator) for decorator in node.decorator_list}


def _all(tree: ast.Module) -> list[str]:
    """Return the names in __all__ of a module."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
    return []


def _definition(module: str, name: str) -> tuple[Function | ast.ClassDef, Path] | None:
    """Return the node that defines a name, and its file, through imports of the module."""
    path = _path(module)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, Function | ast.ClassDef) and node.name == name:
            return node, path
        if isinstance(node, ast.ImportFrom) and any(name == (each.asname or each.name) for each in node.names):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            return _definition(f"{package}.{node.module}" if node.level else str(node.module), name)
    return None


def _path(module: str) -> Path:
    """Return the source file of a module of this repository."""
    base = (ROOT / "kernels" if module.startswith("or1_kernels") else ROOT) / module.replace(".", "/")
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
