"""`or1 train --restarts N`: start a run again after a failure from which the same command resumes."""

from __future__ import annotations

import time
from pathlib import Path

from or1.core.errors import EXIT_RETRY
from or1.core.terminal import tell

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 300.0
_UNFORESEEN = 1
_WANTED = frozenset({129, 130, 143})  # SIGHUP, SIGINT, SIGTERM: somebody ended the run


def may_pass(code: int) -> bool:
    """Return whether a failure with this exit code may be gone at the next attempt.

    Such failures are a lost rank, a full disk, or an exception that or1 does not know, such as a driver's. A signal
    counts too, unless somebody sent the signal to end the run.
    """
    return code in (EXIT_RETRY, _UNFORESEEN) or (code > 128 and code not in _WANTED)


class Restarts:
    """Decides after each attempt whether to start the run again.

    code = start()
    while restarts.again(code):
        code = start()

    checkpoints  folder of the run's checkpoints; a new checkpoint resets the count of failures
    limit        consecutive restarts without a new checkpoint before giving up
    """

    def __init__(self, checkpoints: Path, limit: int):
        self._checkpoints, self._limit = checkpoints, limit
        self._failures, self._reached = 0, 0

    def again(self, code: int) -> bool:
        """Return False if exit code `code` is final; otherwise wait and return True. The pauses grow."""
        from or1.run.checkpoint import committed_steps

        if not may_pass(code):
            return False
        newest = max(committed_steps(self._checkpoints), default=0)
        if newest > self._reached:
            self._failures, self._reached = 0, newest
        if self._failures == self._limit:
            tell(f"or1: exit code {code} again, and no new checkpoint in {self._limit} restarts; giving up")
            return False
        self._failures += 1
        pause = min(FIRST_PAUSE_S * 2 ** (self._failures - 1), LONGEST_PAUSE_S)
        tell(
            f"or1: ended with exit code {code}; restart {self._failures} of {self._limit} since step {self._reached}, "
            f"in {pause:g} s"
        )
        time.sleep(pause)
        return True
