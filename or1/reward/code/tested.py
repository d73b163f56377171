"""The names that a script of asserts takes from the program. The data row decides them before any program runs.

A program can cheat with every name that it may define. In `assert is_close(solve(3), 9)` it could define `is_close` to
accept anything, unless the script does. The row therefore decides, in this order:

  1. its entry point
  2. the names that its reference solution defines
  3. the names in the asserts that are defined nowhere; else those that only the prelude has, such as `gcd` or `add`;
     else one name of Python's, such as `sum`

Every other name must be the script's own, Python's, or one of the well-known MODULES. Pure functions of text.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from or1.core.errors import TestedError

MODULES = {"np": "numpy", "pd": "pandas", "numpy": "numpy", "pandas": "pandas", "scipy": "scipy", "sympy": "sympy"}
"""Name -> module that tests use without an import, in addition to the standard library's."""

COMPARING = frozenset(
    {
        "isclose",
        "Counter",
        "OrderedDict",
        "defaultdict",
        "deque",
        "fabs",
        "sqrt",
        "floor",
        "ceil",
        "pi",
        "inf",
        "nan",
        "reduce",
        "chain",
        "partial",
        "ListNode",
        "TreeNode",
        "list_node",
        "tree_node",
        "is_same_list",
        "is_same_tree",
    }
)
"""Names of the prelude that tests use to compare the results of a program's function."""


class Script(NamedTuple):
    """A complete script of asserts: `source` with the imports and helpers that it lacked, and the names under test."""

    source: str
    names: tuple[str, ...]


def complete(
    source: str,
    *,
    setup: str = "",
    entry_point: str = "",
    reference: str = "",
    question: str = "",
    prelude: bool = False,
) -> Script:
    """Return a script with all its imports and helpers, and the names that it takes from the program.

    setup        source that runs before the script
    entry_point  expression under test, such as `add` or `Solution().add`; "" if the row has none
    reference    the row's reference solution; "" if it has none
    question     the row's problem. HumanEval's problems are Python, with helpers that the tests may use
    prelude      whether the tests expect LeetCode's prelude

    Raises TestedError if the script asserts nothing when it runs, or uses undefined names.
    """
    tree = ast.parse(source)
    try:
        ast.parse(setup)
    except SyntaxError as error:
        raise TestedError(f"the setup of the tests is not Python: {error}") from error
    _require_asserts(tree)
    free = _free(tree) - _made(_parsed(setup))
    stars = prelude or _has_star(tree) or _has_star(_parsed(setup))
    entry = _root(entry_point)
    helpers = _helpers(question, free, entry)
    free -= set(helpers)
    constants = _constants(_parsed(reference), free)
    helpers = {**helpers, **constants}
    free -= set(constants)
    names = {entry} if entry else free & _made_on_top(_parsed(reference))
    others = free - names - set(vars(builtins))
    modules = MODULES.keys() | sys.stdlib_module_names
    known = {name for name in others & modules if _is_only_looked_into(tree, name)}
    others -= known
    if stars or names:
        others -= prelude_names()
    if names:
        # A class with another name than the entry point is the program's if the tests only pass it as an argument.
        names |= {name for name in others if name[:1].isupper() and _is_argument_only(tree, name, names)}
    else:
        names = _guessed(tree, free - known, others)
    if missing := sorted(others - names - prelude_names()):
        raise TestedError(
            f"the tests use {', '.join(missing)}, which neither they nor Python define; define or import "
            "it in the tests, or name what is under test as 'entry_point'"
        )
    _require_values(tree, names)
    imports = [f"import {MODULES.get(name, name)} as {name}" for name in sorted(known)]
    return Script("\n".join([*imports, *helpers.values(), source]), tuple(sorted(names)))


@functools.cache
def prelude_names() -> frozenset[str]:
    """Return the names of inside/prelude.py, those of its star imports included, without Python's own."""
    tree = ast.parse((Path(__file__).parent / "inside" / "prelude.py").read_text(encoding="utf-8"))
    names = _made(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            module = importlib.import_module(str(node.module))
            names |= set(getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")])
    return frozenset(names - set(vars(builtins)))


def _guessed(tree: ast.Module, free: set[str], others: set[str]) -> set[str]:
    """Return the names under test of a row that names none. Raises TestedError if they are ambiguous."""
    own, library = others - prelude_names(), others & prelude_names()
    tier = own or library
    if own and library:
        _refuse_mixtures(tree, own, library)
        if all(n[:1].isupper() and _is_argument_only(tree, n, library) for n in own):
            tier = others  # `own` has classes only, which are arguments of functions with a library's name
    if not tier:
        in_asserts = [_called(node.test) & free for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        tier = set.intersection(*in_asserts) if in_asserts else set()
        if len(tier) != 1:
            raise TestedError("the tests call no function of the program; name what is under test as 'entry_point'")
    called = {name for name in tier if name in _called(tree) or _is_argument(tree, name)}
    functions = {name for name in called if not name[:1].isupper()}
    tested = functions or called or tier
    for outer, inner in _nested(tree, tested):
        raise TestedError(
            f"the tests call {outer} with what {inner} returned, and neither they nor the row define "
            "either; name what is under test as 'entry_point', or define the other in the tests"
        )
    rest = {name for name in tier - tested if name[:1].isupper() and _is_argument_only(tree, name, tested)}
    return tested | rest


def _refuse_mixtures(tree: ast.Module, own: set[str], library: set[str]) -> None:
    """Raise TestedError if an assert calls a name of the library although the tests also use undefined names."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assert):
            continue
        mixed = _called(node.test) & library - COMPARING
        if mixed and not all(name[:1].isupper() for name in own):
            raise TestedError(
                f"the tests call {sorted(mixed)[0]}, which may be the program's or a library's; name "
                "what is under test as 'entry_point', or import the other in the tests"
            )


# --- names that a script defines and uses


def _parsed(source: str) -> ast.Module:
    """Return the syntax tree of a source, or an empty tree if the source is not Python."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def _free(tree: ast.Module) -> set[str]:
    """Return the names that are read but never set, at any level."""
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return used - _made(tree)


def _made(tree: ast.AST) -> set[str]:
    """Return the names that are set, at any level."""
    made: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            made.add(node.id)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.ExceptHandler):
            made.add(node.name or "")
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).partition(".")[0])
    return made - {"*", ""}


def _made_on_top(tree: ast.Module) -> set[str]:
    """Return the globals of a module after it has run, without imported modules."""
    made: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            made.add(node.name)
        elif not isinstance(node, ast.Import):
            made |= _made(node)
    return made


def _has_star(tree: ast.Module) -> bool:
    return any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in ast.walk(tree))


def _root(entry_point: str) -> str:
    """Return the global at the start of an entry point: `Solution` of `Solution().add`."""
    nodes = ast.walk(_parsed(entry_point))
    return next((node.id for node in nodes if isinstance(node, ast.Name)), "")


def _helpers(question: str, free: set[str], entry: str) -> Mapping[str, str]:
    """Return name -> source of the functions that the problem defines and the tests use, except the one to write."""
    found: dict[str, str] = {}
    tree = _parsed(question)
    given = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name != entry]
    wanted = [name for name in free if entry]
    while wanted:
        name = wanted.pop()
        node = next((n for n in given if n.name == name), None)
        if node is not None and name not in found:
            found[name] = ast.unparse(node)
            wanted += _free(ast.Module([node], []))
    if found:
        imports = [ast.unparse(n) for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        found = {"": "\n".join(imports)} | found
    return found


def _constants(tree: ast.Module, free: set[str]) -> dict[str, str]:
    """Return name -> source of the reference's constants that the tests use. A program could choose other values."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            plain = not any(isinstance(n, ast.Name | ast.Call | ast.Lambda) for n in ast.walk(node.value))
            if plain and node.targets[0].id in free:
                found[node.targets[0].id] = ast.unparse(node)
    return found


# --- calls


def _called(tree: ast.AST) -> set[str]:
    return {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


def _arguments(node: ast.Call) -> list[ast.expr]:
    return [*node.args, *(keyword.value for keyword in node.keywords)]


def _calls(tree: ast.AST, names: set[str]) -> Iterator[ast.Call]:
    """Yield the calls of one of the names, or of a method of the result of such a call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            root = node.func
            while isinstance(root, ast.Attribute | ast.Call):
                root = root.value if isinstance(root, ast.Attribute) else root.func
            if isinstance(root, ast.Name) and root.id in names:
                yield node


def _is_only_looked_into(tree: ast.AST, name: str) -> bool:
    """Return whether every use is `name.attribute`, as the uses of a module are."""
    bases = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return all(id(n) in bases for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name)


def _is_argument(tree: ast.AST, name: str) -> bool:
    return any(
        isinstance(a, ast.Name) and a.id == name
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
        for a in _arguments(n)
    )


def _is_argument_only(tree: ast.AST, name: str, tested: set[str]) -> bool:
    """Return whether a name occurs only in arguments of a function under test, or of a function of the tests."""
    inside = {
        id(n)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and ((isinstance(call.func, ast.Name) and call.func.id not in vars(builtins)) or _is_of(call, tested))
        for a in _arguments(call)
        for n in ast.walk(a)
    }
    return all(id(n) in inside for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name)


def _is_of(call: ast.Call, names: set[str]) -> bool:
    return next(_calls(ast.Expression(call), names), None) is call


def _nested(tree: ast.AST, names: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (outer, inner) for each call of one name with a call of another name in its arguments."""
    for outer in ast.walk(tree):
        if isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name) and outer.func.id in names:
            for argument in _arguments(outer):
                for inner in sorted(_called(argument) & names - {outer.func.id}):
                    yield outer.func.id, inner


# --- scripts that no program can pass


def _require_asserts(tree: ast.Module) -> None:
    """Raise TestedError if no assert runs: there is none, or all are in functions that are never called."""
    if not any(isinstance(n, ast.Assert) for n in ast.walk(tree)):
        raise TestedError("the tests assert nothing")
    definitions = ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef
    defined = {n.name: n for n in tree.body if isinstance(n, definitions)}
    waiting: list[ast.AST] = [n for n in tree.body if not isinstance(n, definitions)]
    while waiting:
        for node in ast.walk(waiting.pop()):
            if isinstance(node, ast.Assert):
                return
            if isinstance(node, ast.Name) and node.id in defined:
                waiting.append(defined.pop(node.id))
    raise TestedError(
        "the tests assert nothing when they run: their functions are never called; name what is under "
        "test as 'entry_point', or call them"
    )


def _require_values(tree: ast.Module, names: set[str]) -> None:
    """Raise TestedError if the tests pass a function to the program, since only values can be passed."""
    functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    for call in _calls(tree, names | {"candidate"}):
        for argument in _arguments(call):
            passed = argument.id if isinstance(argument, ast.Name) and argument.id in functions else ""
            if passed or isinstance(argument, ast.Lambda):
                raise TestedError(
                    f"the tests pass the function {passed or 'lambda'} to the program, which is in "
                    "another process and takes values only; leave the row out"
                )
