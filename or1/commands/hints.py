"""A command line that is nearly right: the message names the verb or the form that was meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """argparse's parser, with the nearest verb for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message on standard error, and exit with 2."""
        found = _CHOICE.search(message)
        close = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), n=1) if found else []
        super().error(f"{message}{f'; did you mean {close[0]!r}?' if close else ''}")


def set_in_two_words(arguments: Sequence[str]) -> str | None:
    """Return a message for `--set A.B C`, whose value argparse would call an unrecognized argument."""
    for flag, name, value in zip(arguments, arguments[1:], arguments[2:], strict=False):
        if flag == "--set" and "=" not in name and not name.startswith("-") and not value.startswith("--"):
            return f"--set {name} {value}: write the setting as one word, --set {name}={value}"
    return None
