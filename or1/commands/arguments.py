"""The argument parser of `or1`, and options that several verbs share."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the nearest verb for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message on standard error, and exit with code 2."""
        found = _CHOICE.search(message)
        close = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), n=1) if found else []
        super().error(f"{message}{f'; did you mean {close[0]!r}?' if close else ''}")


def set_in_two_words(arguments: Sequence[str]) -> str | None:
    """Return an error message for `--set A.B C`, whose value argparse would call an unrecognized argument."""
    for flag, name, value in zip(arguments, arguments[1:], arguments[2:], strict=False):
        if flag == "--set" and "=" not in name and not name.startswith("-") and not value.startswith("--"):
            return f"--set {name} {value}: write the setting as one word, --set {name}={value}"
    return None


def positive(text: str) -> int:
    """Parse a whole number from 1 to 999,999,999. Raises ArgumentTypeError for any other text."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `--set A.B=C`, which may be repeated; the values go to `arguments.overrides`."""
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="A.B=C", help="override a value"
    )


def seconds(text: str) -> float:
    """Parse a number above 0. Raises ArgumentTypeError for any other text."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def add_job_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how long a job of a scheduler lasts."""
    parser.add_argument(
        "--job-hours", type=seconds, metavar="H", help="hours that a job lasts (default: those of this SLURM job)"
    )
    parser.add_argument(
        "--grace-s", type=seconds, metavar="S", help="seconds between SIGTERM and the end of a job (default: 900)"
    )


def add_sampling_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options of verbs that sample responses; `out` is the help text of --out."""
    parser.add_argument("--out", type=Path, help=out)
    add_overrides(parser)
    parser.add_argument("--fresh", action="store_true", help="move earlier results aside and start from scratch")
