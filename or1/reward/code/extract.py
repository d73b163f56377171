"""The program in a response: its last fenced block that may be Python.

Chosen is the last closed block that is marked as Python: python, python3, py, {.python}, main.py. Without any such
block it is the last closed block that has no mark, or a mark that names no other language: models forget the mark, and
LiveCodeBench asks for none. A block marked as another language, ```cpp or ```text, is no program.

A fence is three or more backticks or tildes. A closing fence stands at the start of a line, indented no further than
its opening fence, so that one inside a docstring does not cut the program. A mark behind such a fence opens another
block, since the model forgot to close the first. An opening fence of backticks may follow text in its line.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_BACKTICKS = re.compile(r"`{3,}")
_ATTRIBUTE = re.compile(r"[\w-]+=(\"[^\"]*\"|'[^']*'|\S*)")
_PYTHON = re.compile(r"python[0-9.]*|py[0-9.]*|ipython|.*\.py", re.IGNORECASE)
_BEFORE_A_FENCE = " \t>-*+.)0123456789"
"""Characters of quotes and list items, which indent the block that begins in their line."""
_MAX_INFO = 200
"""Characters that may follow an opening fence; what is longer is text."""
_OTHERS = frozenset(
    {
        "asm",
        "bash",
        "bat",
        "c",
        "c#",
        "c++",
        "cc",
        "clojure",
        "console",
        "cpp",
        "cs",
        "csharp",
        "css",
        "csv",
        "cuda",
        "cxx",
        "dart",
        "diff",
        "dockerfile",
        "elixir",
        "erlang",
        "f#",
        "fortran",
        "fsharp",
        "go",
        "golang",
        "h",
        "haskell",
        "hpp",
        "hs",
        "html",
        "in",
        "input",
        "java",
        "javascript",
        "js",
        "json",
        "jsx",
        "julia",
        "kotlin",
        "latex",
        "lisp",
        "log",
        "lua",
        "makefile",
        "markdown",
        "math",
        "matlab",
        "md",
        "mermaid",
        "none",
        "objc",
        "ocaml",
        "octave",
        "out",
        "output",
        "pascal",
        "perl",
        "php",
        "plain",
        "plaintext",
        "powershell",
        "prolog",
        "pseudo",
        "pseudocode",
        "pycon",
        "python-console",
        "python-repl",
        "python-traceback",
        "r",
        "rb",
        "rs",
        "rst",
        "ruby",
        "rust",
        "scala",
        "scheme",
        "sh",
        "shell",
        "sql",
        "stdin",
        "stdout",
        "swift",
        "terminal",
        "tex",
        "text",
        "toml",
        "ts",
        "tsx",
        "txt",
        "typescript",
        "xml",
        "yaml",
        "yml",
        "zsh",
    }
)
"""Marks that name something other than Python."""


class _Fence(NamedTuple):
    """An opening fence in line `line`. mark: "python", "none" or "other"."""

    character: str
    length: int
    indent: int
    mark: str
    line: int


def last_python_block(text: str) -> str | None:
    """What the program's block holds; None if there is none or it is blank. Linear in len(text)."""
    lines = text.split("\n")
    found: dict[str, tuple[_Fence, int]] = {}
    block: _Fence | None = None
    for i, line in enumerate(lines):
        if block is None:
            block = _opening(line, i)
            continue
        bare = line.lstrip(" \t")
        if not bare.startswith(block.character * block.length) or len(line) - len(bare) > block.indent:
            continue
        rest = bare.lstrip(block.character)
        apart = not rest or rest[0].isspace()
        following = _opening(rest if apart else line, i)
        if apart or following is not None:
            found[block.mark] = (block, i)
            block = following
    chosen = found.get("python") or found.get("none")
    if chosen is None:
        return None
    fence, end = chosen
    body = lines[fence.line + 1 : end]
    # A block in a list is indented with its fence, or its fence alone is.
    surplus = min((len(line) - len(line.lstrip(" \t")) for line in body if line.strip()), default=0)
    program = "".join(line[min(fence.indent, surplus) :] + "\n" for line in body)
    return program if program.strip() else None


def _opening(line: str, number: int) -> _Fence | None:
    bare = line.lstrip(" \t")
    indent = len(line) - len(bare)
    if bare.startswith("~~~"):
        info = bare.lstrip("~")
        start, length = indent, len(bare) - len(info)
    else:
        runs = list(_BACKTICKS.finditer(line))
        # An even number are pairs around code within the line.
        if len(runs) % 2 == 0:
            return None
        start, length = runs[-1].start(), len(runs[-1][0])
        info = line[runs[-1].end() :]
    if "`" in info or len(info) > _MAX_INFO:
        return None
    if not line[:start].strip(_BEFORE_A_FENCE):
        indent = start
    return _Fence(line[start], length, indent, _mark(info), number)


def _mark(info: str) -> str:
    words = re.split(r"[\s{},:;]+", _ATTRIBUTE.sub(" ", info))
    word = next((word.lstrip(".") for word in words if word.strip(".") and not word.startswith("#")), "")
    if _PYTHON.fullmatch(word):
        return "python"
    return "other" if word.lower() in _OTHERS else "none"
