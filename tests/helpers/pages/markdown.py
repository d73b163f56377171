"""Markdown of the generated pages: tables, and docstrings in Google style."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
# `name   meaning`, as in the tables of fields; `name: meaning`, as in Google style.
_FIELD = re.compile(r"^(\S+(?:, \S+)*)\s{2,}(\S.*)$")
_ITEM = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)$")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a table. A pipe in a cell is escaped."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]


def docstring(text: str) -> list[str]:
    """Return a docstring, without common indentation, as lines of Markdown."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        # A title of a section is a line of its own, and may follow another section without an empty line.
        for part in re.split(rf"\n(?=(?:{'|'.join(SECTIONS)}):\n)", block):
            lines += [*_block(part.split("\n")), ""]
    return lines[:-1]


def _block(lines: list[str]) -> list[str]:
    title = lines[0].removesuffix(":")
    if lines[0].endswith(":") and title in SECTIONS:
        return _section(title, [line.removeprefix("    ") for line in lines[1:]])
    if all(line.startswith("    ") for line in lines):
        return ["```text", *(line.removeprefix("    ") for line in lines), "```"]
    if _FIELD.match(lines[0]):
        return table(("name", "meaning"), _items(lines, _FIELD))
    return lines


def _section(title: str, lines: list[str]) -> list[str]:
    heading = "Arguments" if title == "Args" else title
    if title in ("Returns", "Yields"):
        return [f"**{heading}:** {' '.join(line.strip() for line in lines)}"]
    items = list(_items(lines, _ITEM))
    return [f"**{heading}**", "", *table(("error", "cause") if title == "Raises" else ("name", "meaning"), items)]


def _items(lines: list[str], form: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Yield (names as code, meaning) of a list of items, whose further lines are indented. Raises ValueError."""
    name, words = "", [""]
    for line in lines:
        found = None if line.startswith(" ") else form.match(line)
        if found is None and not line.startswith(" "):
            raise ValueError(f"this line of a docstring is neither an item nor indented under one: {line!r}")
        if found is None:
            words.append(line.strip())
            continue
        if name:
            yield name, " ".join(words)
        name, words = ", ".join(f"`{each}`" for each in found[1].split(", ")), [found[2]]
    yield name, " ".join(words)
