"""Every error that ends a command: the message names what is wrong, the limit and the remedy.

`or1` prints the message as one line, without a traceback, and returns the error's `exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

EXIT_USAGE, EXIT_DATA, EXIT_RUN, EXIT_RETRY, EXIT_INTERRUPTED = 2, 65, 70, 75, 130
"""Bad arguments or config; bad data; anything else of or1; run the same command again; Ctrl-C."""


class Or1Error(ValueError):
    """Base of or1's own errors. Any other exception is a bug, or another library's, and keeps its traceback."""

    exit_code = EXIT_RUN


class WireError(Or1Error):
    """Bytes that hold no tree of or1.core.types."""


class FaultError(Or1Error):
    """OR1_FAULT is not of the form above."""


class DataError(Or1Error):
    """Data that cannot be trained on; the message names every offending file and its bad rows."""

    exit_code = EXIT_DATA


class RowError(Or1Error):
    """Why one row is unusable."""


class RunError(Or1Error):
    """A run directory that cannot be used as asked; the message names it and the remedy."""


class CheckpointError(Or1Error):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


class ForeignFileError(CheckpointError):
    """A file or link in a checkpoint, or a name in its manifest, that or1 did not write; nothing there is opened."""

    exit_code = EXIT_USAGE


class DiskError(Or1Error):
    """A checkpoint that could not be written; the message names the path, the bytes and the remedy."""

    exit_code = EXIT_RETRY


class MetricsError(Or1Error):
    """The metrics of a run were taken from under it; the message names the file and the remedy."""


class RolloutError(Or1Error):
    """Rollouts that cannot be written or read back; the message names the file and the remedy."""


class StoreError(Or1Error):
    """A folder of results that belongs to something else; the message names it and the remedy."""


class ModelError(Or1Error):
    """A checkpoint that cannot be trained; the message names it and the remedy."""


class ModelSourceError(Or1Error):
    """A model that is neither in a folder nor at the hub; the message names it and the remedy."""


class MemoryOptionError(Or1Error):
    """An option that cannot be had on this model or machine; the message names it and the remedy."""


class PackingError(ModelError):
    """An architecture that packed rows would train wrongly; `reason` is short and has no numbers."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class AttentionError(Or1Error):
    """A backend that cannot run here; the message names it and the remedy."""


class DistError(Or1Error):
    """Ranks that cannot be arranged as asked; the message names the numbers and the remedy."""


class RowMemoryError(RuntimeError):
    """A packed row did not fit into memory; the message says on which rank. All ranks raise it, unless `here_only`."""

    def __init__(self, message: str, here_only: bool = False):
        super().__init__(message)
        self.here_only = here_only


class MemoryLimitError(Or1Error):
    """A sequence that does not fit into memory even in a row of its own; the message names it and the remedy."""


class ShorterRowsError(MemoryLimitError):
    """A row that did not fit in a run that cannot go on in shorter ones; the same command resumes with those."""

    exit_code = EXIT_RETRY


class EngineError(Or1Error):
    """An engine that cannot work or has stopped working; the message names the cause and a remedy."""


class EndpointError(Or1Error):
    """A server that cannot be used or has stopped answering; the message names it and the remedy."""


class ServerLost(EngineError):
    """The server died or hangs."""

    exit_code = EXIT_RETRY


class ScorerError(Or1Error):
    """A scorer that cannot work at all: the message names the cause and a remedy."""


class RewardFunctionError(ScorerError):
    """A function of the user's own that cannot be loaded or called."""

    exit_code = EXIT_USAGE


class ReportError(Or1Error):
    """The folder is not a run, or holds nothing to report yet; the message says which and what to do."""


class PlanError(Or1Error):
    """What cannot be planned; the message names it and the remedy."""

    exit_code = EXIT_USAGE


class OptimizerError(Or1Error):
    """An optimizer that cannot be had, or a state that is not its own; the message names it and the remedy."""


class GroundTruthError(Or1Error):
    """Why a row's ground truth is unusable."""


class TestedError(Or1Error):
    """Why no program could be told right by these tests."""


class Problem(NamedTuple):
    """One mistake: where (dotted path), and what is wrong with a remedy."""

    path: str
    message: str


class ConfigError(Or1Error):
    """A config that cannot run; `problems` holds every mistake found."""

    exit_code = EXIT_USAGE

    def __init__(self, source: str, problems: Sequence[Problem]):
        self.source, self.problems = source, tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{source}: {count}"]
        lines += [f"  {i}. {p.path}: {p.message}" for i, p in enumerate(problems, 1)]
        super().__init__("\n".join(lines))
