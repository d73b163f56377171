"""The generated pages are fresh, and public docstrings say what every argument is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from or1.core import errors
from tests.helpers.pages import COMMAND, PAGES, api
from tests.helpers.pages.api import Public
from tests.helpers.pages.exit_codes import CODES
from tests.helpers.pages.markdown import docstring

# Their class documents them: or1/magic/entropy.py is among the files that a reader of one update opens, and these have
# no lines to spare (test_reading_bill.py). This tuple may only become shorter.
WITHOUT_SECTIONS = tuple(
    f"or1.magic.EntropyController.{name}" for name in ("start", "alpha", "update", "load_state", "restore")
)


def public_names() -> list[Public]:
    """Return every public function, class and method."""
    found = [each for module in api.MODULES for each in api.public(module)]
    return found + [method for each in found for method in api.methods(each)]


def parameters(each: Public) -> list[str]:
    """Return the names of the parameters of a function or of a class's __init__; [] where fields are a table."""
    node = each.node
    if isinstance(node, ast.ClassDef):
        node = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
        if node is None:
            return []
    given = node.args
    names = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [name.arg for name in names if name is not None and name.arg not in ("self", "cls")]


def section(text: str, title: str) -> str | None:
    """Return a section of a docstring in Google style."""
    found = re.search(rf"^{title}:\n((?:    .*(?:\n|$))+)", text, flags=re.MULTILINE)
    return found and found[1]


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_fresh(name: str, root: Path) -> None:
    assert (root / "docs" / name).read_text(encoding="utf-8") == PAGES[name](), f"run {COMMAND}"


def test_every_argument_of_the_command_line_has_a_meaning() -> None:
    empty = [line for line in PAGES["cli.md"]().splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not empty, "these arguments have no help"


def test_every_exit_code_is_explained() -> None:
    known = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert known <= {code for code, *_ in CODES}


def test_public_docstrings_have_sections_for_arguments_and_results() -> None:
    missing = []
    for each in public_names():
        if each.name in WITHOUT_SECTIONS:
            continue
        text = ast.get_docstring(each.node) or ""
        names, args = parameters(each), section(text, "Args") or ""
        listed = {
            name.strip("* ") for line in re.findall(r"^    ([\w*, ]+): ", args, flags=re.M) for name in line.split(",")
        }
        missing += [f"{each.name}: {name} is not under Args" for name in names if name not in listed]
        missing += [f"{each.name} has no argument {name}" for name in listed - set(names) if names]
        result = getattr(each.node, "returns", None)
        # "Return ..." in the first line is enough without arguments.
        if names and result is not None and ast.unparse(result) != "None" and section(text, "Returns") is None:
            missing.append(f"{each.name}: no Returns")
    assert not missing, "\n".join(missing)


def test_every_field_of_a_public_class_is_documented() -> None:
    missing = []
    for each in public_names():
        if isinstance(each.node, ast.ClassDef) and not each.name.endswith("Dict"):
            text = ast.get_docstring(each.node) or ""
            fields = [item.target.id for item in each.node.body if isinstance(item, ast.AnnAssign)]
            missing += [f"{each.name}.{name}" for name in fields if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_sections_and_tables_of_a_docstring_become_markdown() -> None:
    text = (
        "Return x.\n\nname   meaning | of it,\n       in two lines\n\n    code()\n\n"
        "Args:\n    a, b: [N].\n    **rest: more\n        of it.\nReturns:\n    x."
    )
    assert docstring(text) == [
        *("Return x.", ""),
        *("| name | meaning |", "| --- | --- |", r"| `name` | meaning \| of it, in two lines |", ""),
        *("```text", "code()", "```", ""),
        *(
            "**Arguments**",
            "",
            "| name | meaning |",
            "| --- | --- |",
            "| `a`, `b` | [N]. |",
            "| `**rest` | more of it. |",
        ),
        *("", "**Returns:** x."),
    ]
    with pytest.raises(ValueError, match="neither an item"):
        docstring("Args:\n    no item here")
