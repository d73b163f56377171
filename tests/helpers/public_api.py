"""The public interface of or1 as lines of text. `python -m tests.helpers.public_api` writes tests/house/public_api.txt.

The interface is what users write or read by name: Python names with their parameters, verbs with their options, exit
codes, TOML keys, and the files of a run directory.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, is_typeddict

from or1 import cli
from or1.config import Config
from or1.core import errors
from tests.helpers.small_run import ROOT, arguments

COMMITTED = ROOT / "tests/house/public_api.txt"
COMMAND = "python -m tests.helpers.public_api"
# Their own __all__ holds the public names.
PACKAGES = ("or1", "or1_kernels", "or1.magic")
# Methods that serve the head itself; users name the fields.
INTERNAL = ("or1_kernels.HeadOptions",)
# Read as text, because an import may need TRL or verl.
INTEGRATIONS = ("or1.integrations.transformers", "or1.integrations.trl", "or1.integrations.verl")


DIRECTORY = "# Files of a run directory"
OUT_OF_DATE = (
    "the public interface differs from tests/house/public_api.txt: other people's programs, commands, configs or runs "
    f"may break. If the change is wanted, run `{COMMAND}`, and say so in the commit"
)


def committed() -> tuple[list[str], list[str]]:
    """Return the committed lines: the interface, and the files of a run directory."""
    lines = COMMITTED.read_text(encoding="utf-8").splitlines()
    at = lines.index(DIRECTORY)
    return lines[:at], lines[at:]


def public_api() -> list[str]:
    """Return every line but those of the run directory, which need a run."""
    sections = {
        "Python": [line for package in PACKAGES for line in _package(package)]
        + [line for module in INTEGRATIONS for line in _module(module)],
        "Verbs": list(_verbs(cli.make_parser(), "or1")),
        "Exit codes": [f"{name} = {code}" for name, code in vars(errors).items() if name.startswith("EXIT_")],
        "TOML keys": list(_keys(Config.model_json_schema())),
    }
    return [line for title, lines in sections.items() for line in (f"# {title}", *sorted(lines), "")]


def run_directory(run_dir: Path) -> list[str]:
    """Return the paths of the files in a run directory, with N for numbers of steps, ranks and events."""
    found = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}
    short = {re.sub(r"events\.out\.tfevents\..*", "events.out.tfevents.*", name) for name in found}
    return [DIRECTORY, *sorted({re.sub(r"(?<=_)\d+", "N", name) for name in short})]


def short_run(folder: Path) -> Path:
    """Train for one step of each stage with everything that leaves a file, and return the run directory."""
    settings = {"stage__0__steps": 1, "stage__1__steps": 1, "log__tensorboard": "true"}
    assert cli.main(arguments(folder / "run", **settings)) == 0
    return folder / "run"


def _package(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    for attribute in module.__all__:
        value = getattr(module, attribute)
        if isinstance(value, str):
            continue
        if is_typeddict(value):
            yield f"{name}.{attribute}({', '.join(value.__annotations__)})"
            continue
        yield f"{name}.{attribute}{_signature(inspect.signature(value))}"
        if inspect.isclass(value) and f"{name}.{attribute}" not in INTERNAL:
            yield from _members(f"{name}.{attribute}", value)


def _members(name: str, cls: type) -> Iterator[str]:
    """Yield public methods and properties that the class itself defines."""
    for member, value in vars(cls).items():
        value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if member.startswith("_"):
            continue
        if inspect.isfunction(value):
            yield f"{name}.{member}{_signature(inspect.signature(value))}"
        elif isinstance(value, property) and member not in getattr(cls, "_fields", ()):
            yield f"{name}.{member}"


def _signature(signature: inspect.Signature) -> str:
    """Return parameters with kinds and defaults, without annotations."""
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _module(name: str) -> Iterator[str]:
    """Yield public functions and classes of a module from its source."""
    tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield f"{name}.{node.name}({_parameters(node.args)})"
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            fields = [_field(item) for item in node.body if isinstance(item, ast.AnnAssign)]
            yield f"{name}.{node.name}({', '.join(fields)})"


def _parameters(parameters: ast.arguments) -> str:
    for parameter in ast.walk(parameters):
        if isinstance(parameter, ast.arg):
            parameter.annotation = None
    return ast.unparse(parameters)


def _field(item: ast.AnnAssign) -> str:
    return ast.unparse(item.target) + (f"={ast.unparse(item.value)}" if item.value else "")


def _verbs(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    """Yield a line an argument of a verb, and those of the verbs under it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, inner in action.choices.items():
                yield f"{name} {verb}"
                yield from _verbs(inner, f"{name} {verb}")
        elif not isinstance(action, argparse._HelpAction):
            yield f"{name} {_argument(action)}"


def _argument(action: argparse.Action) -> str:
    options = "|".join(action.option_strings) or action.dest.upper()
    facts = [type(action).__name__.strip("_").removesuffix("Action").lower()]
    facts += [f"type={action.type.__name__.strip('_')}"] if action.type else []
    facts += [f"nargs={action.nargs!r}"] if action.nargs is not None else []
    facts += ["required"] if action.required and action.option_strings else []
    facts += [f"choices={action.choices}"] if action.choices else []
    if action.default not in (None, argparse.SUPPRESS) and options != "--version":
        facts.append(f"default={action.default!r}")
    return f"{options} ({', '.join(facts)})"


def _keys(schema: dict[str, Any], node: dict[str, Any] | None = None, path: str = "") -> Iterator[str]:
    """Yield `section.key: type = default` of a JSON schema, tables of arrays as `stage[].steps`."""
    node = node or schema
    for name, value in node.get("properties", {}).items():
        inner, key = _resolved(schema, value), f"{path}{name}"
        items = _resolved(schema, inner.get("items", {}))
        if "properties" in inner:
            yield from _keys(schema, inner, f"{key}.")
        elif "properties" in items:
            yield from _keys(schema, items, f"{key}[].")
        else:
            default = f" = {value['default']!r}" if "default" in value else ", required"
            yield f"{key}: {_type(schema, value)}{default if name not in node.get('required', ()) else ', required'}"


def _resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def _type(schema: dict[str, Any], node: dict[str, Any]) -> str:
    node = _resolved(schema, node)
    if "anyOf" in node:
        return " | ".join(_type(schema, option) for option in node["anyOf"])
    if "enum" in node or "const" in node:
        return " | ".join(repr(value) for value in node.get("enum", [node.get("const")]))
    if "prefixItems" in node:
        return f"array of {len(node['prefixItems'])} {_type(schema, node['prefixItems'][0])}s"
    if node.get("type") == "array":
        return f"array of {_type(schema, node.get('items', {}))}"
    if node.get("type") == "object":
        return "table"
    return node.get("type", "any")


def main() -> None:
    """Write the committed file anew."""
    with tempfile.TemporaryDirectory() as folder:
        lines = [*public_api(), *run_directory(short_run(Path(folder)))]
    COMMITTED.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stderr.write(f"{COMMITTED.relative_to(ROOT)}: {len(lines)} lines\n")


if __name__ == "__main__":
    main()
