"""Weights & Biases and trackio: a run's metrics, alarms and a few responses, sent from threads of their own.

Nothing here may stop or slow the training. Each tracker has a queue that never blocks, and a failure is one message.
RUN/.wandb.json and RUN/.trackio.json keep the id of the tracker's run and the last step that was sent. So a resumed run
continues there, and repeated steps are not sent twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from or1.config import Config
from or1.core.files import write_whole
from or1.core.types import Group
from or1.run.tracker_writers import COLUMNS, TrackioWriter, WandbWriter, Writer

_MOST_WAITING = 1000
_FINISH_S = 30.0
_MOST_TEXT = 4000
_PACKAGES = ("or1", "torch", "transformers", "vllm", "triton", "flash-attn")
_REMEDIES = {
    "wandb": "`wandb login`, or WANDB_MODE=offline and later `wandb sync`; docs/trackers.md",
    "trackio": "docs/trackers.md",
}


class Trackers:
    """The trackers of `[log]`; none on ranks that do not write."""

    def __init__(self, trackers: Sequence[Tracker], samples: int = 0, tell: Callable[[str], None] = print):
        self._trackers, self._samples, self._tell = trackers, samples, tell
        self._rows: list[list[Any]] = []

    @classmethod
    def of(cls, config: Config, tell: Callable[[str], None]) -> Trackers:
        """Start the trackers that `[log]` names. `tell` shows a message."""
        settings = config.model_dump(mode="json") | {"versions": _versions()}
        makers: dict[str, tuple[str | None, Callable[..., Writer]]] = {
            "wandb": (config.log.wandb, WandbWriter),
            "trackio": (config.log.trackio, TrackioWriter),
        }
        trackers = []
        for name, (project, make) in makers.items():
            if project is not None:
                mark = Mark.read(config.run_path, name, project)
                trackers.append(Tracker(name, make(project, config.run_path, mark.id, settings), mark))
        return cls(trackers, config.log.samples, tell)

    def recall(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Send the lines of metrics.jsonl that a tracker has not had: it was turned on late, or was killed."""
        for record in records:
            metrics = {key: value for key, value in record.items() if key not in ("step", "time") and value is not None}
            self._put(record["step"], metrics, [])

    def add_samples(self, groups: Sequence[Group]) -> None:
        """Keep one response each of a few groups, for the next `log`."""
        if self._trackers and self._samples and groups:
            stride = -(-len(groups) // self._samples)
            self._rows = [_row(group) for group in groups[::stride]]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step, with its samples; show a tracker's failure once."""
        self._put(step, metrics, self._rows)
        self._rows = []

    def alarm(self, step: int, text: str) -> None:
        """Send an alarm."""
        for tracker in self._trackers:
            tracker.put(step, lambda writer: writer.alarm(step, text), repeats=True)

    def close(self, failed: bool = False) -> None:
        """Wait for what is still to be sent, half a minute at most. `failed`: the run ends with an error."""
        for tracker in self._trackers:
            tracker.close(failed)
        self._show()

    def _put(self, step: int, metrics: Mapping[str, float], rows: list[list[Any]]) -> None:
        # Trackers draw curves, and JSON has no infinity.
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.put(step, lambda writer: writer.log(step, finite, rows))
        self._show()

    def _show(self) -> None:
        for tracker in self._trackers:
            if problem := tracker.new_problem():
                self._tell(f"log.{tracker.tracker}: {problem}")


class Mark(NamedTuple):
    """What RUN/.NAME.json keeps: the tracker's project, the id of its run, and the last step that it was given."""

    path: Path
    project: str
    id: str
    step: int

    @classmethod
    def read(cls, run_dir: Path, name: str, project: str) -> Mark:
        """Return the mark of a tracker; a new one for another project, or if the file is absent or damaged."""
        path = run_dir / f".{name}.json"
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["project"] == project:
                return cls(path, project, str(found["id"]), int(found["step"]))
        return cls(path, project, secrets.token_hex(4), -1)

    def write(self) -> None:
        """Replace the file."""
        fields = {"project": self.project, "id": self.id, "step": self.step}
        write_whole(self.path, json.dumps(fields), durable=False)


class Tracker(threading.Thread):
    """One tracker: a queue of actions, and the thread that gives them to the writer."""

    def __init__(self, tracker: str, writer: Writer, mark: Mark):
        super().__init__(name=f"or1-{tracker}", daemon=True)
        self.tracker = tracker
        self._writer, self._mark = writer, mark
        self._before = self._last = mark.step
        self._actions: queue.Queue[tuple[int | None, Callable[[Writer], None]]] = queue.Queue(_MOST_WAITING)
        self._problem, self._shown, self._failed = "", "", False
        self.start()

    def put(self, step: int, action: Callable[[Writer], None], *, repeats: bool = False) -> None:
        """Queue an action of a step. Drop the action if the tracker had the step, has failed, or is far behind.

        repeats  True: one of several actions of a step, which does not count as having had the step
        """
        if self._failed or step <= (self._before if repeats else self._last):
            return
        if not repeats:
            self._last = step
        try:
            self._actions.put_nowait((None if repeats else step, action))
        except queue.Full:
            self._problem = self._problem or f"is {_MOST_WAITING} steps behind; it lacks steps from {step} on"

    def run(self) -> None:
        """Start the writer and carry out the actions until `close`."""
        try:
            self._writer.start()
            while True:
                step, action = self._actions.get()
                if step is not None:
                    # Before the step is sent: a crash between them loses the step, and does not repeat it.
                    self._mark = self._mark._replace(step=step)
                    self._mark.write()
                action(self._writer)
        except _Closed:
            return
        except Exception as error:  # noqa: BLE001  # Whatever its type, an error of a tracker must not end the run.
            self._failed = True
            text = " ".join(str(error).split())[:300] or type(error).__name__
            self._problem = f"sends nothing more ({text}); {_REMEDIES[self.tracker]}"

    def close(self, failed: bool) -> None:
        """Finish the tracker's run, and wait for at most half a minute."""

        def finish(writer: Writer) -> None:
            writer.finish(failed)
            raise _Closed

        if not self._failed:
            with contextlib.suppress(queue.Full):
                self._actions.put((None, finish), timeout=_FINISH_S)
            self.join(_FINISH_S)
            if self.is_alive():
                self._problem = f"was not done {_FINISH_S:.0f} s after the last step; {_REMEDIES[self.tracker]}"

    def new_problem(self) -> str:
        """Return what went wrong since the last call, "" if nothing did."""
        if self._problem == self._shown:
            return ""
        self._shown = self._problem
        return self._shown


class _Closed(Exception):
    """The writer has finished."""


def _row(group: Group) -> list[Any]:
    response, score = group.responses[0], group.scores[0]
    row = [group.prompt.text[:_MOST_TEXT], response.text[:_MOST_TEXT], score.reward, str(score.status), response.finish]
    assert len(row) == len(COLUMNS)
    return row


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
