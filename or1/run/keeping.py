"""Which checkpoints stay: the newest few, and those that `[checkpoint]` keeps for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from or1.config import CheckpointConfig
from or1.core.errors import CheckpointError
from or1.run.checkpoint import read_manifest, step_folder


@dataclass(frozen=True)
class Keeping:
    """The rule by which old checkpoints are removed.

    newest      how many of the newest stay
    every       multiples of this many steps stay; None: none for that reason
    stage_ends  whether the last step of every stage stays
    """

    newest: int
    every: int | None = None
    stage_ends: bool = False

    @classmethod
    def of(cls, settings: CheckpointConfig) -> Keeping:
        """Return the rule of `[checkpoint]`."""
        return cls(settings.keep, settings.keep_every, settings.keep_stage_ends)

    def spare(self, folder: Path, steps: Sequence[int]) -> list[int]:
        """Return those of the committed steps, ascending, that may be removed."""
        return [step for step in steps[: -self.newest] if not self.for_good(folder, step)]

    def for_good(self, folder: Path, step: int) -> str:
        """Return why a checkpoint stays although newer ones exist, "" if only its age keeps it.

        A checkpoint whose manifest cannot be read is no known end of a stage.
        """
        if self.every is not None and step % self.every == 0:
            return f"every {self.every} steps"
        if self.stage_ends and (ended := _stage_ended(step_folder(folder, step))) is not None:
            return f"end of stage {ended + 1}"
        return ""


def _stage_ended(path: Path) -> int | None:
    """Return the index of the stage that ended with a checkpoint's step, None if none did."""
    try:
        stages, step = (state := read_manifest(path)["state"])["stages"], state["step"]
        return stages["index"] - 1 if stages["index"] and stages["began"] == step else None
    except (CheckpointError, ValueError, TypeError, LookupError):
        return None
