"""What surrounds the steps of a run: its metrics, rollouts, checkpoints, display, and requests to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

import numpy as np

from or1.config import Config
from or1.core import faults
from or1.core.display import StepDisplay
from or1.core.errors import DiskError
from or1.core.memory import peak_memory_gib
from or1.core.types import Group
from or1.dist.world import SINGLE, World
from or1.magic.stages import Step
from or1.rollout.collect import RolloutInterrupted
from or1.run.checkpoint_writer import CheckpointWriter
from or1.run.directory import checkpoints_of
from or1.run.keeping import Keeping
from or1.run.marks import mark_commit
from or1.run.metrics_log import MetricsWriter, rewind_metrics
from or1.run.resume import Checkpointed
from or1.run.rollout_log import write_rollouts
from or1.run.state import TrainState
from or1.run.trackers import Trackers


class Session:
    """The surroundings of one start of a run. Use as a context manager around the steps.

    Every step ends with a line in metrics.jsonl. Some end with a checkpoint, and the last step of a start always does.

    state  of the run, which every step advances
    parts  what a checkpoint holds
    stop   returns True once a person or a scheduler asked the run to stop
    clock  seconds, for checkpoints by time; that of the main rank decides
    """

    def __init__(
        self,
        config: Config,
        state: TrainState,
        parts: Checkpointed,
        display: StepDisplay,
        world: World = SINGLE,
        *,
        stop: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config, self._state, self._parts = config, state, parts
        self._display, self._world, self._stop = display, world, stop
        mark = partial(mark_commit, config.run_path)
        self._checkpoints = CheckpointWriter(
            checkpoints_of(config.run_path), Keeping.of(config.checkpoint), world, mark
        )
        self._metrics: MetricsWriter | None = None
        self._trackers = Trackers([])
        self._checkpoint_s: float | None = None
        self._clock, self._saved_at = clock, clock()
        self._began = time.perf_counter()
        self.stopped = False

    def __enter__(self) -> Session:
        """Open metrics.jsonl after the line of the newest checkpoint; the main rank alone writes."""
        if self._world.is_main:
            run_dir, state = self._config.run_path, self._state
            kept, remarks = rewind_metrics(run_dir / "metrics.jsonl", state.step if state.begun else -1)
            for remark in remarks:
                self._display.message(remark)
            self._display.recall(kept)
            self._metrics = MetricsWriter(run_dir, self._config.log.tensorboard, first_step=state.step + 1)
            self._trackers = Trackers.of(self._config, self._display.message)
            self._trackers.recall(kept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Close the files. After steps without an error, wait for the last checkpoint, which must be written.

        A stop during a rollout is no error: it commits the step before, with the responses that are finished.
        """
        interrupted = isinstance(error, RolloutInterrupted)
        try:
            if interrupted:
                self._interrupt()
            if interrupted or error is None:
                self._checkpoints.wait()
        finally:
            if self._metrics is not None:
                self._metrics.close()
            self._trackers.close(failed=error is not None and not isinstance(error, RolloutInterrupted))
            self._checkpoints.close()
        if error is None and self._state.stages.finished and (left := len(self._state.in_flight.carried)):
            self._display.message(f"{left} groups were still open after the last step and are left out")
        return interrupted

    def begin(self) -> Step:
        """Start the next step."""
        self._began = time.perf_counter()
        number = self._state.step + 1
        faults.at_step(number)
        self._display.begin(number)
        return self._state.stages.step(number)

    def evaluation_is_due(self) -> bool:
        """Return True if evaluations follow the step that was just done."""
        number = self._state.step
        return number % self._config.eval.every_steps == 0 or self._state.stages.is_last_step(number)

    def log_rollout(self, step: Step, groups: Sequence[Group], advantages: Sequence[np.ndarray | None]) -> None:
        """Write rollouts/step_N.parquet if it is due; see `write_rollouts`."""
        if self._world.is_main and step.number % self._config.log.rollouts_every_steps == 0:
            write_rollouts(self._config.run_path / "rollouts", step.number, step.stage_index, groups, advantages)
            self._trackers.add_samples(groups)

    def warn(self, step: Step, groups: Sequence[Group], trained: bool) -> None:
        """Show the warnings that are due after a step: an entropy out of bounds, nothing trained."""
        for warning in self._state.warnings(step, groups, trained, self._config.in_stage(step.stage_index)):
            self._display.message(f"alarm: {warning}")
            self._trackers.alarm(step.number, warning)

    def record_start(self, metrics: dict[str, float]) -> None:
        """Record the evaluation before the first step, as step 0."""
        self._end_stage(0, metrics)
        self._write(0, metrics)

    def finish(self, step: Step, metrics: dict[str, float]) -> None:
        """Record a step, and commit a checkpoint if one is due. Sets `stopped` if any rank was asked to stop."""
        stage_ended = self._end_stage(step.number, metrics)
        metrics |= {"time/step": time.perf_counter() - self._began, "perf/peak_mem_gib": peak_memory_gib()}
        if self._checkpoint_s is not None:
            metrics["time/checkpoint"], self._checkpoint_s = self._checkpoint_s, None
        kl = metrics.get("mismatch/kl") if self._config.rollout.vllm.rounds else None
        if kl is not None and (alarm := self._state.watch.note_mismatch(step.number, kl)):
            self._display.message(f"alarm: {alarm}")
        # The line before the commit: a crash between them repeats the step. The other order would lose the line.
        self._write(step.stage_index, metrics)
        self.stopped = self._world.any(self._stop())
        self._tolerate(self._checkpoints.poll)
        if self._checkpoint_is_due(step.number, stage_ended) or self.stopped or self._state.stages.finished:
            self._checkpoint_s = self.save()

    def _checkpoint_is_due(self, number: int, stage_ended: bool) -> bool:
        """Return True if `[checkpoint]` wants a checkpoint of the step; equal on all ranks. Collective."""
        settings = self._config.checkpoint
        by_time = False
        if settings.every_minutes is not None:
            # One clock decides, that of the main rank: another rank's may differ at the limit.
            late = self._clock() - self._saved_at >= 60 * settings.every_minutes
            by_time = self._world.any(self._world.is_main and late)
        by_steps = number % settings.every_steps == 0
        kept = settings.keep_every is not None and number % settings.keep_every == 0
        return by_time or by_steps or kept or (settings.keep_stage_ends and stage_ended)

    def _interrupt(self) -> None:
        """Commit the last step, with what the rollout of the next had when a stop was requested. Collective."""
        self.stopped = True
        groups = self._state.in_flight.carried
        pairs = [pair for group in groups for pair in zip(group.responses, group.scores, strict=True)]
        done = sum(score is not None or response.finish == "stop" for response, score in pairs)
        self._display.message(
            f"stopped in the rollout of step {self._state.step + 1}: {done} of {len(pairs)} responses are finished and "
            "kept; the resumed step makes the others"
        )
        self._checkpoint_s = self.save()

    def save(self) -> float:
        """Start to write a checkpoint of the run. Return the seconds that the step waited. Collective."""
        began = time.perf_counter()
        self._display.phase("checkpoint")
        self._saved_at = self._clock()
        self._tolerate(self._checkpoints.wait)
        self._checkpoints.save(self._parts.snapshot(self._state))
        return time.perf_counter() - began

    def _end_stage(self, number: int, metrics: dict[str, float]) -> bool:
        """Record the metrics of a step for the stages. Return True if a stage ended with the step."""
        before = self._state.stages.index
        if ended := self._state.stages.finish_step(number, metrics):
            self._display.message(ended)
        return self._state.stages.index > before

    def _write(self, stage_index: int, metrics: dict[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.write(self._state.step, stage_index, metrics)
            self._trackers.log(self._state.step, {"stage": stage_index} | metrics)
        self._display.step({"step": self._state.step, "stage": stage_index} | metrics)

    def _tolerate(self, action: Callable[[], None]) -> None:
        """Run `action`; count and show a checkpoint that could not be written. Only the last one must be."""
        try:
            action()
        except DiskError as error:
            self._state.totals["failed_checkpoints"] += 1
            self._display.message(str(error))
