"""Snippets of README, of docs/ and of the READMEs of rooms: blocks of code, commands, and configs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a whole config needs beside a fragment.
MINIMAL = {
    "run_dir": "runs/x",
    "model": {"path": "some/model"},
    "data": {"train": "rows.jsonl"},
    "stage": [{"steps": 1, "max_response_tokens": 64, "prompts_per_step": 1, "group_size": 2}],
}
# Words of the pages in the place of a number.
_NUMBERS = {"N": "1", "STEP": "1", "H": "1", "TOKENS": "1", "SECONDS": "1"}


def pages(root: Path) -> dict[str, str]:
    """Return the text of README, of every page and of the READMEs of folders, by its path."""
    folders = ("docs/*.md", "or1/*/README.md", "kernels/README.md", "benchmarks/README.md", "examples/*/README.md")
    paths = [root / "README.md", *(path for pattern in folders for path in sorted(root.glob(pattern)))]
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return [block for name, block in FENCED.findall(text) if name == language]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of every line of code that calls `or1`, with numbers in the place of N and STEP.

    Lines of code are indented, or in a block of bash. Words after two spaces explain a command. What a shell does with
    the output is left out.
    """
    indented = [line.removeprefix("    ") for line in FENCED.sub("", text).splitlines() if line.startswith("    ")]
    lines = "\n".join([*indented, *blocks(text, "bash")])
    for line in lines.replace("\\\n", "").splitlines():
        if "[" in line or "<" in line:
            # A form such as `or1 eval TARGET [--step N]`, whose options `options` finds.
            continue
        for part in line.split("&&"):
            words = re.sub(r"(?<=\S) {2,}(?!-)(?=\S).*| +#.*| [|>] .*", "", part)
            found = re.match(r"\s*(?:.* -m )?or1 (\w.*)", words)
            if found:
                yield [_NUMBERS.get(word, word) for word in shlex.split(found[1]) if word != "..."]


def options(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the verb and the options of every command of `or1` in the text, whole or a form with brackets."""
    for found in re.finditer(r"`or1 ([a-z]+)([^`]*)`|^    or1 ([a-z]+)(.*)$", text, flags=re.MULTILINE):
        verb, rest = found[1] or found[3], found[2] or found[4] or ""
        yield verb, re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(r" {2,}(?!-).*", "", rest))


def names_of_peers(text: str) -> Iterator[list[list[str]]]:
    """Yield the names in each row of the table of docs/coming-from.md: of or1, TRL, verl and prime-rl."""
    for row in re.findall(r"^\| `.*$", text, flags=re.MULTILINE):
        yield [re.findall(r"`([\w.]+)`", cell) for cell in row.strip("| ").split("|")]


def merged(base: Mapping[str, Any], fragment: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the keys of a fragment of TOML over those of a base.

    Every table of an array is merged over the first one of the base's array. Other arrays are replaced.
    """
    both = {}
    for key, value in fragment.items():
        under = base.get(key)
        if isinstance(under, dict):
            both[key] = merged(under, value)
        elif isinstance(under, list) and isinstance(under[0], dict):
            both[key] = [merged(under[0], each) for each in value]
    return {**base, **fragment, **both}
