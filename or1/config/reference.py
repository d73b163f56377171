"""Reference of all settings as Markdown: `python -m or1.config.reference > docs/configuration.md`."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from or1.config import Config
from or1.config.section import section_of

_INTRODUCTION = """# Configuration

Made by `python -m or1.config.reference > docs/configuration.md`; a test checks that the two are equal.

A run is one TOML file. An unknown key is an error. `--set section.key=value` overrides a key on the command line. The
tables below have one section per TOML section. A default of `-` means that the key is absent by default, and
**required** that there is no default. Limits are inclusive for `<=` and `>=`.
"""
_HEADER = "| key | type | default | limits | meaning |\n|---|---|---|---|---|"
_TYPES = {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}
_BOUNDS = (("ge", ">= "), ("gt", "> "), ("le", "<= "), ("lt", "< "))


def reference() -> str:
    """Return the page: an introduction, then one table per section in the order of `Config`."""
    return "\n".join([_INTRODUCTION, *_section("", Config)])


def _section(path: str, section: type[BaseModel], listed: bool = False) -> Iterator[str]:
    """Yield the lines of a section and of the sections in it.

    path    dotted path, "" for the top level
    listed  True for an array of tables, such as [[stage]]
    """
    name = f"[[{path}]]" if listed else f"[{path}]"
    yield f"## `{name}`\n" if path else "## Top level\n"
    if path and (about := (section.__doc__ or "").partition(": ")[2]):
        yield f"{about[0].upper()}{about[1:]}\n"
    fields = section.model_fields
    yield _HEADER
    yield from (_row(key, field) for key, field in fields.items() if section_of(field.annotation)[0] is None)
    yield ""
    for key, field in fields.items():
        inner, is_list = section_of(field.annotation)
        if inner is not None:
            yield from _section(f"{path}.{key}" if path else key, inner, is_list)


def _row(key: str, field: FieldInfo) -> str:
    default = "**required**" if field.is_required() else _value(field.get_default(call_default_factory=True))
    cells = (f"`{key}`", _type(field.annotation), default, _limits(field), " ".join((field.description or "").split()))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type(annotation: Any) -> str:
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is Literal:
        return ", ".join(f'`"{choice}"`' for choice in arguments)
    if kind is dict:
        return "table"
    if kind in (Union, types.UnionType):
        return " or ".join(_type(each) for each in arguments if each is not type(None))
    if kind is tuple:
        each = _type(arguments[0])
        return f"list of {each}" if arguments[-1] is Ellipsis else f"list of {len(arguments)}: {each}"
    if kind is dict:
        return "table"
    # Annotated[T, ...]
    return _type(arguments[0]) if hasattr(annotation, "__metadata__") else _TYPES[annotation]


def _limits(field: FieldInfo) -> str:
    """Return the bounds of a field, or of the items of a list."""
    found = [*field.metadata, *_nested(field.annotation)]
    limits = {sign: getattr(each, name) for name, sign in _BOUNDS for each in found if hasattr(each, name)}
    bounds = [_bound(sign, value) for sign, value in limits.items()]
    patterns = [f"`{each.pattern}`" for each in found if getattr(each, "pattern", None)]
    lengths = [f"at most {each.max_length} characters" for each in found if getattr(each, "max_length", None)]
    return ", ".join([*bounds, *patterns, *lengths])


def _nested(annotation: Any) -> Iterator[Any]:
    """Yield the constraints on the items of a list or on the types of a union."""
    for each in getattr(annotation, "__metadata__", ()):
        yield from getattr(each, "metadata", [each])
    for inner in get_args(annotation):
        if get_origin(annotation) is not Literal:
            yield from _nested(inner)


def _bound(sign: str, value: float) -> str:
    return f"{sign}{value:,}" if isinstance(value, int) else f"{sign}{value:g}"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, tuple):
        return f"`[{', '.join(_value(each).strip('`') for each in value)}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    print(reference(), end="")
