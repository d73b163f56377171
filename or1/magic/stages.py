"""Which stage a step belongs to, and when one hands over to the next (Skywork-OR1 report, section 3.1).

The report switched stages by hand, "once performance converged". Here a stage ends after its `steps`, or earlier, with
`until = "plateau"`, once evaluations have stopped improving and the truncation rate has stopped falling
(or1/magic/plateau.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from or1.config import Config, StageConfig
from or1.magic.plateau import Point, has_plateaued


@dataclass
class StageProgress:
    """Where in the stages a run is. Part of the checkpoint.

    index    of the stage that the next step belongs to
    began    rollout steps that were done when it began
    history  its evaluations, from the one that it began with: accuracy or, where rewards are graded, mean reward, and
             the truncation rate of the steps since the evaluation before, NaN for the first
    former   the stage before as it was when it ended, None in the first: the last one may go on after its end
    cut      truncation rates of the steps since the last evaluation
    """

    index: int = 0
    began: int = 0
    history: list[Point] = field(default_factory=list)
    former: StageProgress | None = None
    cut: list[float] = field(default_factory=list)

    def at(self, config: Config, step: int) -> tuple[int, StageConfig]:
        """Index and settings of the stage that runs `step`, one of the present stage or the first of the next.

        Raises IndexError when the run is over.
        """
        index = self.index
        if index < len(config.stage) and step > self.began + config.stage[index].steps:
            index += 1
        if index >= len(config.stage):
            raise IndexError(f"all {len(config.stage)} stages are done before step {step}; add a [[stage]]")
        return index, config.stage[index]

    def finished(self, config: Config) -> bool:
        """Whether no stage is left."""
        return self.index >= len(config.stage)

    def steps_left(self, config: Config, step: int) -> int:
        """Rollout steps from `step` to the end if no stage ends early: what a progress bar counts to."""
        if self.finished(config):
            return 0
        here = self.began + config.stage[self.index].steps - step
        return here + sum(stage.steps for stage in config.stage[self.index + 1 :])

    def is_last_step(self, config: Config, step: int) -> bool:
        """Whether the present stage ends with rollout step `step` at the latest."""
        return step >= self.began + config.stage[self.index].steps

    def may_end(self, config: Config, step: int) -> bool:
        """Whether the present stage may end with `step`, the one at work, be it by an evaluation that is due."""
        stage = config.stage[self.index]
        due = stage.until == "plateau" and step % config.eval.every_steps == 0
        return self.is_last_step(config, step) or (due and len(self.history) + 1 >= 2 * stage.plateau_evals)

    def note_step(self, truncated: float) -> None:
        """Remember the truncation rate of a step; NaN if no group was completed, which says nothing of truncation."""
        if math.isfinite(truncated):
            self.cut.append(truncated)

    def note_evaluation(self, step: int, level: float) -> None:
        """Remember one evaluation of the present stage, with the truncation rate of the steps since the one before."""
        self.history.append((step, level, math.fsum(self.cut) / len(self.cut) if self.cut else math.nan))
        self.cut = []

    def advance(self, config: Config, step: int) -> str | None:
        """Move on if the stage ends with `step`; returns why, in words, or None if it goes on."""
        reason = self._why_it_ends(config, step)
        if reason is not None:
            self.former = StageProgress(self.index, self.began, self.history)
            # The next stage begins with what this one came to; how much it truncates is not known yet.
            start = [(at, level, math.nan) for at, level, _ in self.history[-1:] if at == step]
            self.index, self.began, self.history, self.cut = self.index + 1, step, start, []
        return reason

    def resume(self, config: Config, step: int) -> str | None:
        """Take up a config whose stages may have become longer or shorter; returns what follows from it, in words.

        A finished run goes on with its last stage if that stage, as it is now, does not end with `step`.
        """
        if not self.finished(config):
            if not self.is_last_step(config, step):
                return None
            return f"stage {self.index + 1} ends with step {step}: {self.advance(config, step)}"
        last = self.former
        if last is None or last.index != len(config.stage) - 1 or last.is_last_step(config, step):
            return None
        if (why := last._why_it_ends(config, step)) is not None:
            return f"stage {last.index + 1} has ended: {why}"
        self.index, self.began, self.history, self.former = last.index, last.began, last.history, None
        return f"stage {last.index + 1} goes on, up to {config.stage[last.index].steps} steps"

    def _why_it_ends(self, config: Config, step: int) -> str | None:
        stage = config.stage[self.index]
        if self.is_last_step(config, step):
            return f"its {stage.steps} steps are done"
        if stage.until == "plateau" and has_plateaued(self.history, stage):
            return (
                f"over {stage.plateau_evals} evaluations accuracy or mean reward surely gains less than "
                f"{stage.plateau_gain:g}, and truncation falls less than that"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        former = None if self.former is None else self.former.to_json()
        history = [[None if math.isnan(value) else value for value in point] for point in self.history]
        return {"index": self.index, "began": self.began, "history": history, "former": former, "cut": self.cut}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StageProgress:
        """The inverse of `to_json`."""
        history = [(int(s), *(math.nan if x is None else float(x) for x in numbers)) for s, *numbers in data["history"]]
        former = data.get("former")
        former = None if former is None else cls.from_json(former)
        return cls(data["index"], data["began"], history, former, list(data.get("cut", [])))


def stage_at(config: Config, step: int) -> tuple[int, StageConfig]:
    """Index and settings of the stage that runs rollout step `step`, counted from 1, if no stage ends early.

    Raises IndexError past the last step.
    """
    end = 0
    for index, stage in enumerate(config.stage):
        end += stage.steps
        if step <= end:
            return index, stage
    raise IndexError(f"step {step} is past the last of {config.total_steps} steps; add a [[stage]]")


def last_step_of(config: Config, index: int) -> int:
    """The last rollout step of stage `index`, if no stage ends early."""
    return sum(stage.steps for stage in config.stage[: index + 1])
