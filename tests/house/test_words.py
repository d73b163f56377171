"""Rules of prose that a machine can check: short sentences, imperative first lines, no unidiomatic phrases."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sources import nodes_of, sources

FOLDERS = ("or1", "kernels", "benchmarks", "tests/helpers")
MAX_WORDS = 24
FORBIDDEN = (
    "are to be",
    "are told",
    "be had",
    "for ever",
    "go on with",
    "goes on",
    "how many there",
    "in earnest",
    "in the midst",
    "in vain",
    "is to be",
    "is told",
    "makes known",
    "of the user's own",
    "once more",
    "stand-in",
    "stands beside",
    "takes up",
    "what is wrong",
)
# First words that start a description instead of an instruction.
NO_VERBS = {"A", "All", "An", "Any", "As", "At", "Each", "Every", "For", "From", "How", "If", "In", "It", "Its", "No"}
NO_VERBS |= {
    "None",
    "Nothing",
    "Of",
    "On",
    "One",
    "See",
    "That",
    "The",
    "This",
    "To",
    "What",
    "When",
    "Where",
    "Whether",
}
NO_VERBS |= {"Which", "Who", "With", "Without"}
# Verbs in the imperative that end in s.
VERBS_IN_S = {"Access", "Address", "Bypass", "Compress", "Cross", "Discuss", "Dismiss", "Express", "Focus", "Guess"}
VERBS_IN_S |= {"Miss", "Pass", "Press", "Process", "Suppress", "Toss"}
PROPERTIES = {"property", "cached_property", "functools.cached_property"}


def docstrings(root: Path, folder: str) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield (path:line, node, docstring) of every module, class and function."""
    for path in sources(root, folder):
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                if text:
                    yield f"{path.relative_to(root)}:{getattr(node, 'lineno', 1)}", node, text


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a docstring without its tables, lists of fields and indented blocks."""
    paragraph: list[str] = []
    for line in [*text.split("\n"), ""]:
        words = line.strip()
        is_table = re.match(r"^\S+(, \S+)*\s{2,}\S", words) or (line.startswith("    ") and not paragraph)
        if words and not is_table:
            paragraph.append(words)
            continue
        yield from re.split(r"(?<=[.:;!?])\s+", " ".join(paragraph))
        paragraph = []


def is_imperative(line: str) -> bool:
    """Return True if the first word can be a verb in the imperative, such as Return, Read or Raise."""
    first = line.split()[0].strip(".,:;")
    # A few verbs are written with a hyphen; names in backquotes, symbols and possessives are no verbs.
    if not re.fullmatch(r"[A-Z][a-z]+(-[a-z]+)?", first) or first in NO_VERBS:
        return False
    return not first.endswith("s") or first in VERBS_IN_S


@pytest.mark.parametrize("folder", FOLDERS)
def test_sentences_are_short(root: Path, folder: str) -> None:
    long = []
    for where, _, text in docstrings(root, folder):
        for sentence in sentences(text):
            count = len(re.findall(r"[A-Za-z][\w'`./-]*", sentence))
            if count > MAX_WORDS:
                long.append(f"{where}: {count} words: {sentence[:100]}")
    assert not long, "\n".join([f"sentences of more than {MAX_WORDS} words; split them:", *long])


@pytest.mark.parametrize("folder", FOLDERS)
def test_first_lines_of_functions_are_imperative(root: Path, folder: str) -> None:
    found = []
    for where, node, text in docstrings(root, folder):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("test_"):
            continue
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        if not decorators & PROPERTIES and not is_imperative(text):
            found.append(f"{where}: {text.splitlines()[0][:100]}")
    assert not found, "\n".join(["begin with a verb in the imperative, Return or Yield:", *found])


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_forbidden_phrases(root: Path, folder: str) -> None:
    pattern = re.compile("|".join(rf"\b{re.escape(phrase)}\b" for phrase in FORBIDDEN), re.IGNORECASE)
    found = []
    for where, _, text in docstrings(root, folder):
        found += [f"{where}: {match}" for match in pattern.findall(" ".join(text.split()))]
    assert not found, "\n".join(["rewrite these phrases:", *found])
