"""`TrainState`: what a resumed run needs beside weights and optimizer moments."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from or1.config import Config
from or1.core.errors import RunError
from or1.core.types import Group, Status
from or1.data import SamplerState, SolvedPrompts
from or1.data.unverifiable import UnverifiableRows
from or1.magic.alarms import EntropyWatch
from or1.magic.empty_steps import note_step
from or1.magic.entropy import EntropyController, rollout_entropy
from or1.magic.stages import Stages, Step, take_settings
from or1.rollout.dealing import ResponseLengths
from or1.run.in_flight import InFlight

_PARTS = ("entropy", "solved", "stages", "watch", "lengths", "unverifiable")
_NUMBERS = ("step", "policy_version", "updates", "nonfinite_in_a_row")


@dataclass
class TrainState:
    """Everything that a resumed run needs beside weights and optimizer moments. What is not here is not resumed.

    step                rollout steps done
    policy_version      version of the weights that the engine has
    updates             optimizer steps taken
    nonfinite_in_a_row  updates in a row that were skipped for a non-finite loss or gradient
    totals              counts over the run, for its summary
    budget              `state_dict` of the RowBudget
    inputs              fingerprints of what the run reads, by name (or1.data.fingerprint)
    lengths             mean response length of each prompt at its last visit, for the order of later rollouts
    unverifiable        problems whose gold answers the verifier cannot read
    in_flight           responses that outlive their step; saved apart, because most of it is tensors

    Random numbers need no state: every step derives its seed from (seed, step).
    """

    entropy: EntropyController
    stages: Stages
    step: int = 0
    sampler: SamplerState = field(default_factory=SamplerState)
    solved: SolvedPrompts = field(default_factory=SolvedPrompts)
    policy_version: int = 0
    updates: int = 0
    nonfinite_in_a_row: int = 0
    totals: Counter[str] = field(default_factory=Counter)
    watch: EntropyWatch = field(default_factory=EntropyWatch)
    budget: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    lengths: ResponseLengths = field(default_factory=ResponseLengths)
    unverifiable: UnverifiableRows = field(default_factory=UnverifiableRows)
    in_flight: InFlight = field(default_factory=InFlight)

    @classmethod
    def start(cls, config: Config) -> TrainState:
        """Return the state before the first step."""
        return cls(entropy=EntropyController.start(config.in_stage(0).loss.entropy), stages=Stages(config))

    @property
    def begun(self) -> bool:
        """True if the evaluation before the first step is done, so that a step or its rollout follows."""
        return self.step > 0 or bool(self.in_flight.carried)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint's manifest, without `in_flight`."""
        parts = {name: getattr(self, name).state_dict() for name in _PARTS}
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        sampler, totals = asdict(self.sampler), dict(self.totals)
        return parts | numbers | {"sampler": sampler, "totals": totals, "budget": self.budget, "inputs": self.inputs}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Parts that an older or1 did not save keep their initial state."""
        known = {*_PARTS, *_NUMBERS, "sampler", "totals", "budget", "inputs", "in_flight"}
        if unknown := sorted(state.keys() - known):
            raise ValueError(f"its state holds {', '.join(unknown)}, which this or1 does not know")
        for name in _PARTS:
            if name in state:
                getattr(self, name).load_state(state[name])
        for name in _NUMBERS:
            setattr(self, name, state.get(name, 0))
        self.sampler, self.totals = SamplerState(**state["sampler"]), Counter(state["totals"])
        self.budget, self.inputs = dict(state.get("budget", {})), dict(state.get("inputs", {}))

    def enter(self, step: Step, config: Config) -> Config:
        """Return the config with the settings of the stage of `step`, and give them to the entropy controller.

        At the first step of a stage the controller restarts if the stage sets `loss.entropy.coef`. It also restarts if
        the stage before had no adaptive controller. Otherwise its state continues. The entropy alarm forgets its
        baseline if temperature or top_p change. All of this follows from config and step, so a resumed run repeats it.
        """
        settings = config.in_stage(step.stage_index)
        begins = self.stages.starts(step)
        before = config.in_stage(step.stage_index - 1) if begins else settings
        restart = before.loss.entropy.control != "adaptive" or step.stage.loss.entropy.coef is not None
        take_settings(self.entropy, settings.loss.entropy, restart=begins and restart)
        if _sampled(before) != _sampled(settings):
            self.watch.restart()
        return settings

    def note_update(self, took: bool, limit: int) -> None:
        """Count an update; `took` is False if it was skipped for a non-finite loss or gradient.

        Raises RunError after `limit` skipped updates in a row.
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
        """Record the fingerprints of the run's inputs. Return one line for each that changed since the checkpoint."""
        changed = [name for name in found if self.inputs.get(name, found[name]) != found[name]]
        self.totals["changed_inputs"] += len(changed)
        self.inputs = found
        return [f"{name} changed since step {self.step}: what follows is not the run that it was" for name in changed]

    def warnings(self, step: Step, groups: Sequence[Group], trained: bool, config: Config) -> list[str]:
        """Record a step's entropy, whether it trained anything, and its unverifiable answers. Return warnings."""
        found = []
        entropy = rollout_entropy(groups)
        if math.isfinite(entropy) and (alarm := self.watch.note(step.number, entropy, config, step.stage)):
            self.totals["entropy_alarms"] += 1
            found.append(alarm)
        if empty := note_step(self.totals, groups, trained, config):
            found.append(f"step {step.number}: {empty}")
        if new := self.unverifiable.note(groups):
            found.append(f"step {step.number}: {new}")
        return found

    def count(self, groups: Sequence[Group], config: Config) -> None:
        """Count the scores of a step, and record its response lengths and which prompts it solved."""
        self.lengths.note(groups)
        for group in groups:
            self.totals.update(score.status.value for score in group.scores)
            self.totals["graded_truncated"] += sum(
                r.truncated and s.status is not Status.TRUNCATED
                for r, s in zip(group.responses, group.scores, strict=True)
            )
            self.totals["stragglers"] += sum(r.finish == "deadline" for r in group.responses)
        self.totals["nonfinite_logp"] += unknown_tokens(groups)
        if config.data.drop_solved:
            self.solved.note(groups, config.data.solved_visits)


def _sampled(config: Config) -> tuple[float, float]:
    return config.rollout.temperature, config.rollout.top_p


def unknown_tokens(groups: Sequence[Group]) -> int:
    """Return the number of tokens whose log-probability the engine reported as NaN or infinite."""
    return sum(r.unknown_tokens for group in groups for r in group.responses)
