"""Errors that end a command, with their exit codes. Each message names the problem, the limit and the remedy.

`or1` prints the message without a traceback and returns the error's `exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

EXIT_USAGE, EXIT_DATA, EXIT_RUN, EXIT_RETRY, EXIT_INTERRUPTED = 2, 65, 70, 75, 130
"""Exit codes: bad arguments or config; bad data; other errors of or1; retry the same command; Ctrl-C."""


class Or1Error(ValueError):
    """Base class of or1's own errors.

    Any other exception is a bug, or comes from another library, and is shown with its traceback.
    """

    exit_code = EXIT_RUN


class WireError(Or1Error):
    """Bytes that do not decode to a tree of or1.core.types."""


class FaultError(Or1Error):
    """Value of OR1_FAULT that does not have the form described in or1.core.faults."""


class DataError(Or1Error):
    """Unusable training data; the message names every offending file and its bad rows."""

    exit_code = EXIT_DATA


class RowError(Or1Error):
    """Reason why one row of data is unusable."""


class RunError(Or1Error):
    """Run directory that cannot be used for the requested command."""


class OtherSettingsError(RunError):
    """Run directory of a run whose settings differ in a way that a resumed run must not change."""


class CheckpointError(Or1Error):
    """Missing, damaged or unsuitable checkpoint; the message names the file."""


class ForeignFileError(CheckpointError):
    """File or link in a checkpoint that or1 did not write, or a manifest entry outside the checkpoint. Never opened."""

    exit_code = EXIT_USAGE


class DiskError(Or1Error):
    """Checkpoint that could not be written; the message names the path and the bytes needed."""

    exit_code = EXIT_RETRY


class MetricsError(Or1Error):
    """metrics.jsonl was removed or replaced during the run."""


class RolloutError(Or1Error):
    """Rollout file that cannot be written or read back."""


class StoreError(Or1Error):
    """Results folder that was made under other settings, or cannot be read."""


class ModelError(Or1Error):
    """Model checkpoint that cannot be trained."""


class ModelSourceError(Or1Error):
    """Model that exists neither as a folder nor on the hub."""


class MemoryOptionError(Or1Error):
    """Memory-saving option that is unavailable on this model or machine."""


class PackingError(ModelError):
    """Architecture that packed rows would train incorrectly; `reason` is short and contains no numbers."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class AttentionError(Or1Error):
    """Attention backend that cannot run on this machine."""


class DistError(Or1Error):
    """Arrangement of ranks that is impossible; the message names the numbers."""


class RankSilent(DistError):
    """A rank that others wait for shows no progress."""

    exit_code = EXIT_RETRY


class RowMemoryError(RuntimeError):
    """Out of memory on a packed row; the message names the rank. All ranks raise this error unless `here_only`."""

    def __init__(self, message: str, here_only: bool = False):
        super().__init__(message)
        self.here_only = here_only


class MemoryLimitError(Or1Error):
    """Sequence that does not fit into memory even in a row of its own."""


class ShorterRowsError(MemoryLimitError):
    """Out of memory in a run that cannot shorten its rows while running; the same command resumes with shorter rows."""

    exit_code = EXIT_RETRY


class EngineError(Or1Error):
    """Inference engine that cannot start or has stopped working."""


class EndpointError(Or1Error):
    """Server that is unusable or has stopped answering."""


class ServerLost(EngineError):
    """Inference server that died or hangs."""

    exit_code = EXIT_RETRY


class ScorerError(Or1Error):
    """Scorer that cannot score any response."""


class RewardFunctionError(ScorerError):
    """User-defined reward function that cannot be loaded or called."""

    exit_code = EXIT_USAGE


class ReportError(Or1Error):
    """Folder that is not a run, or a run without anything to report yet."""


class PlanError(Or1Error):
    """Config whose memory or time cannot be estimated."""

    exit_code = EXIT_USAGE


class OptimizerError(Or1Error):
    """Unavailable optimizer, or an optimizer state that does not match the model."""


class GroundTruthError(Or1Error):
    """Reason why a row's ground truth is unusable."""


class TestedError(Or1Error):
    """Reason why no program could pass these tests."""


class Problem(NamedTuple):
    """One mistake in a config: the dotted path of the key, and a message with the remedy."""

    path: str
    message: str


class ConfigError(Or1Error):
    """Config that cannot run; `problems` contains every mistake found."""

    exit_code = EXIT_USAGE

    def __init__(self, source: str, problems: Sequence[Problem]):
        self.source, self.problems = source, tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{source}: {count}"]
        lines += [f"  {i}. {p.path}: {p.message}" for i, p in enumerate(problems, 1)]
        super().__init__("\n".join(lines))
