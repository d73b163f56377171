"""`TrainState`: what a resumed run needs beside weights and optimizer moments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from or1.config import Config
from or1.core.errors import RunError
from or1.core.types import Group, Status
from or1.data import SamplerState, SolvedPrompts
from or1.magic.alarms import EntropyWatch
from or1.magic.entropy import EntropyController
from or1.magic.selection import unknown_tokens
from or1.magic.stages import StageProgress
from or1.run.in_flight import InFlight

if TYPE_CHECKING:
    pass


@dataclass
class TrainState:
    """Everything a resumed run needs beside weights and optimizer moments; what is not here is not resumed.

    Random numbers need no state: every step seeds its own from (seed, step).
    """

    entropy: EntropyController
    step: int = 0
    sampler: SamplerState = field(default_factory=SamplerState)
    solved: SolvedPrompts = field(default_factory=SolvedPrompts)
    policy_version: int = 0
    updates: int = 0
    nonfinite_in_a_row: int = 0
    totals: Counter[str] = field(default_factory=Counter)
    stages: StageProgress = field(default_factory=StageProgress)
    watch: EntropyWatch = field(default_factory=EntropyWatch)
    budget: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    """See `or1.data.fingerprint.inputs_of`."""
    in_flight: InFlight = field(default_factory=InFlight)
    """Saved apart, since most of it is tensors; see `InFlight.to_checkpoint`."""

    @classmethod
    def start(cls, config: Config) -> TrainState:
        """Before the first step."""
        return cls(entropy=EntropyController.start(config.loss.entropy))

    def note_update(self, took: bool, limit: int) -> None:
        """Count an update that was skipped for a non-finite loss or gradient.

        Raises RunError after `limit` of them in a row.
        """
        self.totals["skipped_updates"] += not took
        self.nonfinite_in_a_row = 0 if took else self.nonfinite_in_a_row + 1
        if self.nonfinite_in_a_row >= limit:
            raise RunError(
                f"{limit} updates in a row had a non-finite loss or gradient (optim.max_nonfinite_steps); the weights "
                "are those before them. Lower optim.lr, or look at the last rollouts for the cause"
            )

    def note_evaluation(self, crashes: int, timeouts: int, remark: str) -> str:
        """Count the failed scores of an evaluation. Return its remark the first time in a run, then ""."""
        self.totals["eval_crashes"] += crashes
        self.totals["eval_timeouts"] += timeouts
        first = remark if not self.totals["eval_remarks"] else ""
        self.totals["eval_remarks"] += bool(first)
        return first

    def note_inputs(self, found: dict[str, str]) -> list[str]:
        """Remember what the run reads; returns and counts what has changed since the checkpoint, one line each."""
        changed = [name for name in found if self.inputs.get(name, found[name]) != found[name]]
        self.totals["changed_inputs"] += len(changed)
        self.inputs = found
        return [f"{name} changed since step {self.step}: what follows is not the run that it was" for name in changed]

    def count(self, groups: Sequence[Group]) -> None:
        """Count what became of the responses of a step."""
        for group in groups:
            self.totals.update(score.status.value for score in group.scores)
            self.totals["graded_truncated"] += sum(
                r.truncated and s.status is not Status.TRUNCATED
                for r, s in zip(group.responses, group.scores, strict=True)
            )
            self.totals["stragglers"] += sum(r.finish == "deadline" for r in group.responses)
        self.totals["nonfinite_logp"] += unknown_tokens(groups)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        return {
            "inputs": self.inputs,
            "entropy": self.entropy.state(),
            "step": self.step,
            "sampler": asdict(self.sampler),
            "solved": self.solved.state(),
            "policy_version": self.policy_version,
            "updates": self.updates,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "totals": dict(self.totals),
            "budget": self.budget,
            "stages": self.stages.to_json(),
            "watch": self.watch.to_json(),
        }

    @classmethod
    def from_json(cls, config: Config, data: dict[str, Any]) -> TrainState:
        """The inverse of `to_json`; nothing is in flight."""
        return cls(
            **{name: value for name, value in data.items() if name != "in_flight"}
            | {
                "entropy": EntropyController.start(config.loss.entropy).restore(data["entropy"]),
                "sampler": SamplerState(**data["sampler"]),
                "solved": SolvedPrompts.from_state(data["solved"]) if "solved" in data else SolvedPrompts(),
                "totals": Counter(data["totals"]),
                "stages": StageProgress.from_json(data["stages"]),
                "watch": EntropyWatch.from_json(data["watch"]),
            }
        )
