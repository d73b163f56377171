"""Which stage a step belongs to, and when one hands over to the next (Skywork-OR1 report, section 3.1).

The report switched stages by hand, "once performance converged". Here a stage ends after its `steps`, or earlier, with
`until = "plateau"`, once evaluations have stopped improving and the truncation rate has stopped falling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from or1.config import Config, StageConfig


@dataclass
class StageProgress:
    """Where in the stages a run is. Part of the checkpoint.

    index    of the stage that the next step belongs to
    began    rollout steps that were done when it began
    history  (step, accuracy, truncation rate) of each evaluation within it; accuracy is the mean over the sets
    former   the stage before as it was when it ended, None in the first: the last one may go on after its end
    """

    index: int = 0
    began: int = 0
    history: list[tuple[int, float, float]] = field(default_factory=list)
    former: StageProgress | None = None

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

    def note_evaluation(self, step: int, accuracy: float, truncated: float) -> None:
        """Remember one evaluation of the present stage."""
        self.history.append((step, accuracy, truncated))

    def advance(self, config: Config, step: int) -> str | None:
        """Move on if the stage ends with `step`; returns why, in words, or None if it goes on."""
        reason = self._why_it_ends(config, step)
        if reason is not None:
            self.former = StageProgress(self.index, self.began, self.history)
            self.index, self.began, self.history = self.index + 1, step, []
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
            return (f"accuracy gained less than {stage.plateau_gain:g} and truncation fell less than "
                    f"{stage.plateau_gain:g} over {stage.plateau_evals} evaluations")
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        former = None if self.former is None else self.former.to_json()
        return {"index": self.index, "began": self.began, "history": [list(point) for point in self.history],
                "former": former}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StageProgress:
        """The inverse of `to_json`."""
        history = [(int(s), float(a), float(t)) for s, a, t in data["history"]]
        former = data.get("former")
        return cls(data["index"], data["began"], history, None if former is None else cls.from_json(former))


def has_plateaued(history: Sequence[tuple[int, float, float]], stage: StageConfig) -> bool:
    """Whether the last `plateau_evals` evaluations brought nothing over the best before them.

    Both signals must be flat: accuracy that rises, or truncation that still falls, says that the present context is
    not used up. Evaluations without a number count as no gain.
    """
    window = stage.plateau_evals
    if len(history) <= window:
        return False
    before, after = history[:-window], history[-window:]

    def best(points: Sequence[tuple[int, float, float]], column: int, sign: int) -> float:
        return max((sign * p[column] for p in points if math.isfinite(p[column])), default=-math.inf)

    gains = [best(after, column, sign) - best(before, column, sign) for column, sign in ((1, 1), (2, -1))]
    return all(not gain >= stage.plateau_gain for gain in gains)


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
