"""The page of exit codes, from the errors of or1.core.errors."""

from __future__ import annotations

import inspect

from or1.commands.stop_request import EXIT_TERMINATED
from or1.core import errors
from or1.core.errors import EXIT_DATA, EXIT_INTERRUPTED, EXIT_RETRY, EXIT_RUN, EXIT_USAGE, Or1Error
from tests.helpers.pages.markdown import docstring, table

_INTRODUCTION = """# Exit codes

Made by `python -m tests.helpers.pages`; a test holds page and code equal. An error is one line on standard error,
or a list for a config. A traceback means a bug, or an error of another library.
"""
# (code, meaning, what to do)
CODES = (
    (0, "finished, or stopped by SIGTERM after a commit", ""),
    (1, "an exception that or1 does not know, with its traceback", "report the bug; `--restarts` starts again"),
    (EXIT_USAGE, "usage, config or reward function", "read the list of mistakes; each has a remedy"),
    (
        EXIT_DATA,
        "data that cannot be used or downloaded",
        "the rows are named; mend them or raise `data.max_bad_fraction`",
    ),
    (
        EXIT_RUN,
        "the command cannot continue, a plan does not fit, or `or1 doctor` found a problem",
        "the message names the cause and the remedy",
    ),
    (
        EXIT_RETRY,
        "a lost rank or server, a full disk, rows that must be shorter",
        "start the same command again, or use `--restarts`",
    ),
    (EXIT_INTERRUPTED, "interrupted by Ctrl-C", "start the same command to resume"),
    (EXIT_TERMINATED, "ended by a second SIGTERM", "start the same command to resume from the newest checkpoint"),
)


def page() -> str:
    """Return the page."""
    codes = table(("code", "meaning", "what to do"), ((str(code), *text) for code, *text in CODES))
    kinds = [each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, Or1Error)]
    rows = ((str(each.exit_code), f"`{each.__name__}`", _about(each)) for each in sorted(kinds, key=_order))
    notes = [
        "Another number above 128 is 128 plus the signal that ended the process, such as 137 for SIGKILL.",
        "With `--restarts N`, codes 1 and 75 and signals other than SIGHUP, SIGINT and SIGTERM start the run again.",
    ]
    errors_of = ["## Errors", "", "Classes of `or1.core.errors`, for programs that call or1's functions.", ""]
    head = ("code", "error", "meaning")
    return "\n".join([_INTRODUCTION, *codes, "", *notes, "", *errors_of, *table(head, rows)]) + "\n"


def _order(kind: type[Or1Error]) -> tuple[int, str]:
    return kind.exit_code, kind.__name__


def _about(kind: type[Or1Error]) -> str:
    return " ".join(docstring(inspect.getdoc(kind) or "")).replace("  ", " ")
