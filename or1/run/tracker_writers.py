"""What or1 asks of Weights & Biases and of trackio. Their objects live in one thread each, that of `Tracker`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

COLUMNS = ("prompt", "response", "reward", "status", "finish")
"""Columns of the table of samples."""


class Writer(Protocol):
    """A run in a tracker. Any method may raise or block."""

    def start(self) -> None:
        """Open the tracker's run, or continue the run that has the same id."""
        ...

    def log(self, step: int, metrics: Mapping[str, float], rows: Sequence[Sequence[Any]]) -> None:
        """Send the metrics of a step, and rows of COLUMNS."""
        ...

    def alarm(self, step: int, text: str) -> None:
        """Send an alarm."""
        ...

    def finish(self, failed: bool) -> None:
        """Send what is left and close the tracker's run."""
        ...


class WandbWriter:
    """A run of Weights & Biases. WANDB_MODE, WANDB_API_KEY and the other variables of wandb apply."""

    def __init__(self, project: str, run_dir: Path, run_id: str, settings: Mapping[str, Any]):
        self._project, self._run_dir, self._id, self._settings = project, run_dir, run_id, settings

    def start(self) -> None:
        """Open or continue the run; offline files go to RUN/wandb."""
        import wandb

        # Without a key, `init` would ask for one on the terminal, from this thread.
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise ValueError("it has no API key")
        self._wandb = wandb
        self._run = wandb.init(
            project=self._project,
            id=self._id,
            name=self._run_dir.name,
            resume="allow",
            dir=str(self._run_dir),
            config=dict(self._settings),
            # The run's own display stays as it is.
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, metrics: Mapping[str, float], rows: Sequence[Sequence[Any]]) -> None:
        """Send the metrics of a step, and rows of COLUMNS as the table "samples"."""
        table = {"samples": self._wandb.Table(columns=list(COLUMNS), data=list(rows))} if rows else {}
        self._run.log({**metrics, **table}, step=step)

    def alarm(self, step: int, text: str) -> None:
        """Send an alert, which Weights & Biases forwards to Slack or by mail."""
        self._run.alert(title=f"{self._run_dir.name}, step {step}", text=text)

    def finish(self, failed: bool) -> None:
        """Upload what is left."""
        self._run.finish(exit_code=int(failed))


class TrackioWriter:
    """A run of trackio. TRACKIO_DIR, TRACKIO_SERVER_URL, TRACKIO_SPACE_ID and its other variables apply."""

    def __init__(self, project: str, run_dir: Path, run_id: str, settings: Mapping[str, Any]):
        # trackio finds a run again by its name, so the name contains the id.
        self._project, self._name, self._settings = project, f"{run_dir.name}-{run_id}", settings

    def start(self) -> None:
        """Open or continue the run."""
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=self._project, name=self._name, resume="allow", config=dict(self._settings), embed=False
        )

    def log(self, step: int, metrics: Mapping[str, float], rows: Sequence[Sequence[Any]]) -> None:
        """Send the metrics of a step, and rows of COLUMNS as the table "samples"."""
        table = {"samples": self._trackio.Table(columns=list(COLUMNS), data=[list(row) for row in rows])}
        self._run.log({**metrics, **(table if rows else {})}, step=step)

    def alarm(self, step: int, text: str) -> None:
        """Send an alert."""
        self._run.alert(title=self._name, text=text, step=step)

    def finish(self, failed: bool) -> None:
        """Write what is left."""
        self._run.finish()
