"""The progress of a run: a live panel on a terminal, otherwise (a log file, a batch system) one plain line a step."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from or1.config import StageConfig
from or1.core.records import Record, number
from or1.report.console import default_console, safe
from or1.report.panel import ROWS, Header, Phase, header, values_table
from or1.report.records import Course, eval_histories, plain_line
from or1.reward.terms import graded_run

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_HISTORY = 400  # steps kept for sparklines
_RECENT = 10  # steps behind the estimate of time left


class RunDisplay:
    """The progress of a run; implements `or1.core.display.Display`.

    with RunDisplay(config.total_steps, config.stage) as display:
        display.phase("rollout", 3, 64)
        display.step({"step": 1, "stage": 0, "reward/mean": 0.4, ...})      a record of metrics.jsonl
        display.message("checkpoint step_20 written")

    The block always restores the terminal, also after an error. Missing and non-finite metrics show as "-".
    """

    def __init__(self, total_steps: int, stages: Sequence[StageConfig], console: Console | None = None):
        self._total, self._stages = total_steps, stages
        self._console = console or default_console()
        self._step = 0
        self._started = time.monotonic()
        self._step_ends: deque[float] = deque(maxlen=_RECENT + 1)
        self._phase: Phase | None = None
        self._history: dict[str, deque[float]] = {name: deque(maxlen=_HISTORY) for name in ROWS}
        self._evals: list[Record] = []
        self._graded = False
        self._stage = 0
        # Built in `step`: another thread calls `_render`.
        self._table: RenderableType | None = None
        self._live: Live | None = None

    def __enter__(self) -> RunDisplay:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            from rich.live import Live

            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._phase = None
            self._live.stop()
            self._live = None

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show the current phase (rollout, reward, train, eval, checkpoint) and how far it is."""
        old = self._phase
        if old is not None and old.name == name and done >= old.done:
            self._phase = Phase(name, done, total, old.since)
            return
        self._phase = Phase(name, done, total, time.monotonic())
        if self._live is not None:
            self._live.refresh()

    def progress(self, name: str) -> Callable[[int, int], None]:
        """Return a function of (done, total) that shows how far the phase `name` is."""
        return partial(self.phase, name)

    def recall(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the records of a resumed run: print nothing, and start the panel with their values."""
        for record in records:
            self._step = int(number(record.get("step"), self._step + 1))
            self._stage = int(number(record.get("stage"), self._stage))
            self._note(record)
        if records and self._live is not None:
            self._table = values_table(self._history, self._courses(), self._console)
            self._live.refresh()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show one record of metrics.jsonl."""
        self._step = int(number(metrics.get("step"), self._step + 1))
        stage = int(number(metrics.get("stage"), self._stage))
        if stage != self._stage:
            self._stage = stage
            self.message(f"{self._stage_text()} began at step {self._step}")
        metrics = self._note(metrics)
        self._step_ends.append(time.monotonic())
        self._phase = None
        if self._live is not None:
            self._table = values_table(self._history, self._courses(), self._console)
            self._live.refresh()
            return
        if self._step > 0:
            self.message(plain_line(metrics, self._step, self._total, self._left()))
        for course in self._courses({history.name for history in eval_histories([metrics])}):
            line = f"eval step {self._step}: {course.label} {course.last}"
            if course.change is not None:
                at = f" {course.start}" if course.steps[0] > 0 else ""
                line += f", was {course.first}{at} ({course.change_text})"
            self.message(line)

    def _note(self, record: Mapping[str, Any]) -> Record:
        """Append a record to the history, and return the record with derived metrics and a numeric step."""
        metrics = {**record, "step": self._step}
        if 0 <= self._stage < len(self._stages):
            metrics["group/kept_share"] = number(metrics.get("group/kept")) / self._stages[self._stage].prompts_per_step
        failed = sum(number(metrics.get(f"reward/status/{status}"), 0.0) for status in ("crash", "timeout"))
        # The panel has this row only after the first failure.
        if failed or self._history["reward/failed"]:
            metrics["reward/failed"] = failed
        for key, values in self._history.items():
            if math.isfinite(value := number(metrics.get(key))):
                values.append(value)
        if found := {key: value for key, value in metrics.items() if key.startswith("eval/")}:
            self._evals.append({**found, "step": self._step})
        self._graded = self._graded or graded_run([metrics])
        return metrics

    def _courses(self, names: Container[str] | None = None) -> list[Course]:
        """Return the evaluations so far, of all sets or of the sets in `names`, most important numbers first."""
        histories = [each for each in eval_histories(self._evals) if names is None or each.name in names]
        return [course for history in histories for course in history.courses(self._graded)]

    def message(self, text: str) -> None:
        """Show a line of text that stays, above the live panel."""
        self._console.print(safe(text, self._console), soft_wrap=True)

    def _left(self) -> float | None:
        """Estimate the seconds to the end of the run from the last few steps; None before the second step."""
        intervals = len(self._step_ends) - 1
        if intervals < 1:
            return None
        return (self._step_ends[-1] - self._step_ends[0]) / intervals * max(self._total - self._step, 0)

    def _stage_text(self) -> str:
        if not 0 <= self._stage < len(self._stages):
            return ""
        limit = self._stages[self._stage].max_response_tokens
        return f"stage {self._stage + 1}/{len(self._stages)}, limit {limit:,} tokens"

    def still(self, elapsed_s: float, left_s: float | None) -> RenderableType:
        """Return the panel after the last step, for a picture of a run that was recalled."""
        self._table = values_table(self._history, self._courses(), self._console)
        return self._panel(elapsed_s, left_s, None)

    def _render(self) -> RenderableType:
        return self._panel(time.monotonic() - self._started, self._left(), self._phase)

    def _panel(self, elapsed_s: float, left_s: float | None, phase: Phase | None) -> RenderableType:
        from rich.console import Group

        shown = Header(
            step=self._step,
            total=self._total,
            elapsed_s=elapsed_s,
            left_s=left_s,
            stage=self._stage_text(),
            phase=phase,
            phase_s=0.0 if phase is None else time.monotonic() - phase.since,
        )
        return Group(header(shown, self._console), *([] if self._table is None else [self._table]))
