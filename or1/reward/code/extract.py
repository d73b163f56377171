"""Extraction of the program from a response: the last fenced block that may be Python.

The program is the last closed block marked as Python: python, python3, py, {.python}, main.py. Without such a block it
is the last closed block that has no mark, or a mark that names no other language. Models forget the mark, and
LiveCodeBench asks for none. A block marked as another language, ```cpp or ```text, is never a program.

A fence is three or more backticks or tildes. A closing fence starts its line and is indented no further than its
opening fence. A fence inside a docstring therefore does not end the program. A closing fence with a mark opens another
block, since the model forgot to close the first. An opening fence of backticks may follow text in its line.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_BACKTICKS = re.compile(r"`{3,}")
_ATTRIBUTE = re.compile(r"[\w-]+=(\"[^\"]*\"|'[^']*'|\S*)")
_PYTHON = re.compile(r"python[0-9.]*|py[0-9.]*|ipython|.*\.py", re.IGNORECASE)
_BEFORE_A_FENCE = " \t>-*+.)0123456789"
"""Characters of quotes and list items, which may precede an opening fence and indent its block."""
_MAX_INFO = 200
"""Most characters after an opening fence; a longer line is text."""
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
"""Marks of blocks that are not Python."""


class _Fence(NamedTuple):
    """An opening fence in line `line`. mark: "python", "none" or "other"."""

    character: str
    length: int
    indent: int
    mark: str
    line: int


def last_python_block(text: str) -> str | None:
    """Return the program in a response, or None if there is no block for it or the block is blank. Linear in time."""
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
    # In a list, the block and its fence are indented, or only the fence is.
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
        # An even number of fences are pairs around inline code.
        if len(runs) % 2 == 0:
            return None
        start, length = runs[-1].start(), len(runs[-1][0])
        info = line[runs[-1].end() :]
    if "`" in info or len(info) > _MAX_INFO:
        return None
    if not line[:start].strip(_BEFORE_A_FENCE):
        indent = start
    return _Fence(character=line[start], length=length, indent=indent, mark=_mark(info), line=number)


def _mark(info: str) -> str:
    words = re.split(r"[\s{},:;]+", _ATTRIBUTE.sub(" ", info))
    word = next((word.lstrip(".") for word in words if word.strip(".") and not word.startswith("#")), "")
    if _PYTHON.fullmatch(word):
        return "python"
    return "other" if word.lower() in _OTHERS else "none"
