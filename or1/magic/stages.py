"""Which stage a step belongs to, and when a stage ends (Skywork-OR1 report, section 3.1).

The report switched stages by hand, "once performance converged". Here a stage ends after its `steps`. With
`until = "plateau"` a stage ends earlier: once evaluations stop improving and the truncation rate stops falling
(or1/magic/plateau.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from or1.config import Config, EntropyConfig, StageConfig
from or1.core.seeds import seed_of
from or1.magic.entropy import EntropyController
from or1.magic.plateau import Point, eval_level, has_plateaued


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rollout step: its number from 1, the index and settings of its stage, and the seed of its random draws."""

    number: int
    stage_index: int
    stage: StageConfig
    seed: int


@dataclass
class StageRecord:
    """One stage of a run so far.

    index    place in the config's stages, from 0
    began    rollout steps that were done when the stage began
    history  evaluations of the stage, the one at its beginning included: (step, level, truncation rate). The level is
             accuracy, or the mean reward where rewards are graded. The truncation rate is the mean over the steps since
             the evaluation before, NaN for the first
    """

    index: int = 0
    began: int = 0
    history: list[Point] = field(default_factory=list)


class Stages:
    """The stages of a config, and the position of a run in them. Part of every checkpoint.

    now     the stage of the next step; its index equals the number of stages once the run is finished
    former  the stage before, as it was at its end; None in the first. A longer config may continue it
    cut     truncation rates of the steps since the last evaluation
    """

    def __init__(self, config: Config):
        self._config = config
        self.now = StageRecord()
        self.former: StageRecord | None = None
        self.cut: list[float] = []

    @property
    def index(self) -> int:
        """Index of the stage of the next step."""
        return self.now.index

    @property
    def finished(self) -> bool:
        """True once no stage is left."""
        return self.now.index >= len(self._config.stage)

    def step(self, number: int) -> Step:
        """Return rollout step `number`, which is of the current stage or the first of the next.

        Raises IndexError past the last stage.
        """
        index, stages = self.now.index, self._config.stage
        if index < len(stages) and number > self.now.began + stages[index].steps:
            index += 1
        if index >= len(stages):
            raise IndexError(f"all {len(stages)} stages are done before step {number}; add a [[stage]]")
        return Step(number=number, stage_index=index, stage=stages[index], seed=seed_of(self._config.seed, number))

    def steps_left(self, number: int) -> int:
        """Return the rollout steps after step `number` if no stage ends early."""
        if self.finished:
            return 0
        here = self.now.began + self._config.stage[self.now.index].steps - number
        return here + sum(stage.steps for stage in self._config.stage[self.now.index + 1 :])

    def is_last_step(self, number: int) -> bool:
        """Return True if the current stage ends with step `number` at the latest."""
        return self._is_last(self.now, number)

    def may_end(self, number: int, done: int | None = None) -> bool:
        """Return True if the current stage may end with step `number`, by its length or by an evaluation.

        done  the last step whose evaluation is in the history; None: the step before `number`
        """
        stage, every = self._config.stage[self.now.index], self._config.eval.every_steps
        due = stage.until == "plateau" and number % every == 0
        coming = number // every - (number - 1 if done is None else done) // every
        return self.is_last_step(number) or (due and len(self.now.history) + coming >= 2 * stage.plateau_evals)

    def finish_step(self, number: int, metrics: Mapping[str, float]) -> str | None:
        """Record the metrics of step `number`, and start the next stage if the current one ends with that step.

        Returns the reason in words if a stage ended and another follows, else None.
        """
        # NaN: no group was completed, so nothing is known of truncation.
        if math.isfinite(truncated := metrics.get("completion/truncated", math.nan)):
            self.cut.append(truncated)
        if (level := eval_level(metrics)) is not None:
            self.note_evaluation(number, level)
        ended = self.now.index
        reason = self.advance(number)
        if reason is None or self.finished:
            return None
        own = self._config.stage[self.now.index].own_settings()
        sets = "; the next has " + ", ".join(f"{key} = {value}" for key, value in own.items()) if own else ""
        return f"stage {ended + 1} ends with step {number}: {reason}{sets}"

    def note_evaluation(self, number: int, level: float) -> None:
        """Record one evaluation of the current stage, with the mean truncation rate since the evaluation before."""
        rate = math.fsum(self.cut) / len(self.cut) if self.cut else math.nan
        self.now.history.append((number, level, rate))
        self.cut = []

    def advance(self, number: int) -> str | None:
        """Start the next stage if the current one ends with step `number`. Return the reason, None if it continues."""
        reason = self._why_it_ends(self.now, number)
        if reason is not None:
            # The next stage begins at the level that this one reached. Its truncation rate is not known yet.
            start = [(at, level, math.nan) for at, level, _ in self.now.history[-1:] if at == number]
            self.former, self.now = self.now, StageRecord(self.now.index + 1, number, start)
            self.cut = []
        return reason

    def resume(self, number: int) -> str | None:
        """Adapt to a config whose stages became longer or shorter. Return a message, None if nothing follows.

        A finished run continues its last stage if that stage, by the new config, does not end with step `number`.
        """
        if not self.finished:
            if not self.is_last_step(number):
                return None
            ended = self.now.index
            return f"stage {ended + 1} ends with step {number}: {self.advance(number)}"
        last = self.former
        if last is None or last.index != len(self._config.stage) - 1 or self._is_last(last, number):
            return None
        if (why := self._why_it_ends(last, number)) is not None:
            return f"stage {last.index + 1} has ended: {why}"
        self.now, self.former = last, None
        return f"stage {last.index + 1} continues, up to {self._config.stage[last.index].steps} steps"

    def starts(self, step: Step) -> bool:
        """Return True if `step` is the first of its stage and another stage came before."""
        return step.stage_index > 0 and (self.now.index, self.now.began + 1) == (step.stage_index, step.number)

    def _is_last(self, record: StageRecord, number: int) -> bool:
        return number >= record.began + self._config.stage[record.index].steps

    def _why_it_ends(self, record: StageRecord, number: int) -> str | None:
        stage = self._config.stage[record.index]
        if self._is_last(record, number):
            return f"its {stage.steps} steps are done"
        if stage.until == "plateau" and has_plateaued(record.history, stage):
            return (
                f"over {stage.plateau_evals} evaluations accuracy or mean reward gains less than "
                f"{stage.plateau_gain:g} with certainty, and truncation falls by less than that"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint's manifest."""
        former = None if self.former is None else _plain(self.former) | {"former": None, "cut": []}
        return _plain(self.now) | {"former": former, "cut": self.cut}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.now, former = record_of(state), state.get("former")
        self.former = None if former is None else record_of(former)
        self.cut = list(state.get("cut", []))


def take_settings(controller: EntropyController, settings: EntropyConfig, *, restart: bool) -> None:
    """Give the entropy controller the settings of a stage. Its state continues within their bounds, or restarts.

    restart  True: c is `settings.coef` and the gate open, as before the first step of a run
    """
    for name in ("control", "target", "delta", "coef_min", "coef_max"):
        setattr(controller, name, getattr(settings, name))
    if restart or settings.control == "constant":
        controller.coef, controller.gate = settings.coef, True
    elif settings.control == "adaptive":
        controller.coef = min(max(controller.coef, settings.coef_min), settings.coef_max)


def record_of(state: Mapping[str, Any]) -> StageRecord:
    """Return the current stage from the data of `Stages.state_dict`."""
    return StageRecord(state["index"], state["began"], [_point(values) for values in state["history"]])


def _point(values: Sequence[Any]) -> Point:
    step, level, truncated = (math.nan if value is None else float(value) for value in values)
    return int(step), level, truncated


def _plain(record: StageRecord) -> dict[str, Any]:
    history = [[None if math.isnan(value) else value for value in point] for point in record.history]
    return {"index": record.index, "began": record.began, "history": history}
