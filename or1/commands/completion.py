"""`or1 completion`: a script that completes the command line in a shell, made by the package shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from or1.core.errors import RunError

SHELLS = ("bash", "zsh", "fish")
_FILES = frozenset({"config", "target", "text", "out"})
_FOLDERS = frozenset({"run_dir", "run_dirs", "dir"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 completion`."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that will read the script")


def run(arguments: argparse.Namespace) -> int:
    """Print the script. Raises RunError if shtab is not installed."""
    print(script(arguments.parser, arguments.shell))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of a shell in SHELLS for a parser. Raises RunError if shtab is not installed."""
    try:
        import shtab
    except ImportError as error:
        raise RunError(
            f"completion needs the package shtab ({error}); pip install 'or1[completion]', and repeat the command"
        ) from error
    for action in _actions(parser):
        if action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told
        elif action.dest in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell=shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _actions(each)
