"""`or1 train --nproc N`: torchrun on this machine, with or1's exit code and enough time to finish a step on SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_FINISH_S = 24 * 3600
"""How long torchrun waits for a step and its commit after SIGTERM; a second SIGTERM does not wait."""


def run_ranks(nproc: int, arguments: Sequence[str]) -> int:
    """Run `or1 ARGUMENTS` in `nproc` processes on this machine; returns the exit code of the rank that failed first."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    # One thread a rank is torchrun's own choice where this is unset; the cores divided by the ranks serve a CPU better.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    options = ["--standalone", f"--nproc-per-node={nproc}", f"--shutdown-timeout={_FINISH_S}", "-m", "or1", *arguments]
    try:
        run(get_args_parser().parse_args(options))
    except ChildFailedError as error:
        first = error.get_first_failure()[1]
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


def forward_signals() -> None:
    """Not yet."""
    print(signal.SIGTERM, sys.path, Path)
