"""`or1 train --restarts N`: start a run again that ended in a way in which the same command would go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from or1.core.errors import EXIT_RETRY
from or1.core.terminal import tell
from or1.run.checkpoint import committed_steps

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 300.0
_UNFORESEEN = 1
_WANTED = frozenset({129, 130, 143})  # SIGHUP, SIGINT, SIGTERM: somebody ended the run


def may_pass(code: int) -> bool:
    """Whether an exit code is of what may be gone next time: a lost rank, a full disk, an exception that or1 does not
    know (a driver's, for example), or a signal that nobody sent to end the run.
    """
    return code in (EXIT_RETRY, _UNFORESEEN) or (code > 128 and code not in _WANTED)


def keep_running(start: Callable[[bool], int], checkpoints: Path, restarts: int) -> int:
    """Call `start` until it returns a code that is final; returns that.

    start        runs the run to its end and returns the exit code; it is told whether it is called for the first time
    checkpoints  folder of the run's checkpoints: a new one says that the last start was worth it
    restarts     starts without a new checkpoint before giving up; they follow each other at growing intervals
    """
    failures, reached = 0, 0
    first = True
    while may_pass(code := start(first)):
        first = False
        newest = max(committed_steps(checkpoints), default=0)
        if newest > reached:
            failures, reached = 0, newest
        if failures == restarts:
            tell(f"or1: exit code {code} again, and no new checkpoint in {restarts} restarts; giving up")
            break
        failures += 1
        pause = min(FIRST_PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S)
        tell(f"or1: ended with exit code {code}; restart {failures} of {restarts} since step {reached}, in {pause:g} s")
        time.sleep(pause)
    return code
