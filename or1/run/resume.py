"""Checkpoints of a run: what goes into one, and how a run resumes from the newest that fits.

A checkpoint that does not fit is reported, and the one before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from or1.config import Config
from or1.core.errors import CheckpointError, Or1Error
from or1.core.types import Prompt
from or1.data import SamplerState
from or1.dist.oom_retry import RowBudget
from or1.dist.world import World
from or1.run.checkpoint import Checkpoint, load_checkpoint, load_latest, remove_partials, step_folder
from or1.run.directory import checkpoints_of, row_cap
from or1.run.in_flight import InFlight
from or1.run.marks import lost_newest
from or1.run.state import TrainState

_REQUIRED = frozenset({"entropy", "policy_version", "sampler", "stages", "step", "totals", "updates", "watch"})
# Errors that a reader raises for state of another shape; RuntimeError is torch's, for sizes that do not match.
_UNFIT = (ValueError, TypeError, AttributeError, LookupError, OverflowError, RuntimeError)


class TrainedTensors(Protocol):
    """The tensors of a checkpoint and the number of updates behind them: the optimizer (or1.train.optim)."""

    updates: int

    def state_tensors(self) -> dict[str, Tensor]: ...

    def state_rows(self) -> dict[str, int]: ...

    def load_state_tensors(self, tensors: dict[str, Tensor], updates: int) -> None: ...


@dataclass(frozen=True)
class Checkpointed:
    """The parts of a run whose state a checkpoint holds."""

    config: Config
    world: World
    optimizer: TrainedTensors
    budget: RowBudget
    prompts: list[Prompt]
    tokenizer: PreTrainedTokenizerBase

    def snapshot(self, state: TrainState) -> Checkpoint:
        """Return a checkpoint of the run. The tensors of the optimizer are not copied."""
        state.updates, state.budget = self.optimizer.updates, self.budget.state_dict()
        in_flight, tensors = state.in_flight.to_checkpoint(self.prompts)
        plain = state.state_dict() | {"in_flight": in_flight}
        return Checkpoint(state.step, plain, self.optimizer.state_tensors() | tensors, self.optimizer.state_rows())

    def restore(self, step: int | None, message: Callable[[str], None]) -> TrainState:
        """Load the checkpoint of `step`, or the newest for None, and return the run's state. Collective.

        Returns the state before the first step if `step` is 0 or there is no checkpoint. Raises CheckpointError if
        there are checkpoints and none can be used.
        """
        found = None if step == 0 else self._newest(message) if step is None else self._exactly(step)
        if found is None:
            return TrainState.start(self.config)
        self.budget.load_state(found.budget)
        message(f"resumed after step {found.step}")
        self._fit_to_data(found, message)
        before = found.stages.index
        if change := found.stages.resume(found.step):
            message(change)
        # Partial rollouts have one temperature and group size in all stages (or1.config.rollout_rules).
        keep = self.config.rollout.partial_tokens is not None
        entered = found.stages.index > before and not found.stages.finished
        if entered and (dropped := found.in_flight.leave_stage(keep_open=keep)):
            message(f"{dropped} groups under way are dropped: stage {before + 1}, in which they began, has ended")
        return found

    def cap_rows(self, message: Callable[[str], None]) -> None:
        """Use shorter rows than the checkpoint's, if the run ended because those ran out of memory. Collective."""
        cap = int(self.world.gather(str(row_cap(self.config.run_path) or self.budget.max_tokens).encode())[0])
        if cap < self.budget.max_tokens:
            message(f"rows of {cap} tokens, since those of {self.budget.max_tokens} ran out of memory")
            self.budget.max_tokens, self.budget.out_of_memory = cap, self.budget.out_of_memory + 1

    def _exactly(self, step: int) -> TrainState:
        try:
            return self._fill(load_checkpoint(step_folder(checkpoints_of(self.config.run_path), step), self.world))
        except CheckpointError as error:
            remedy = "restore it, or remove its folder, and the one before is taken"
            raise type(error)(f"{error}; {remedy}") from error

    def _newest(self, message: Callable[[str], None]) -> TrainState | None:
        folder, found = checkpoints_of(self.config.run_path), list[TrainState]()

        def use(checkpoint: Checkpoint) -> None:
            found[:] = [self._fill(checkpoint)]

        if self.world.is_main:
            remove_partials(folder)
        self.world.barrier()
        newest, warnings = load_latest(folder, self.world, use)
        for warning in warnings:
            message(warning)
        if newest is not None and (lost := lost_newest(self.config.run_path)):
            message(lost)
        return found[0] if found else None

    def _fill(self, checkpoint: Checkpoint) -> TrainState:
        """Load the tensors into the optimizer and return the state. Raises CheckpointError if they do not fit."""
        try:
            _require_counts(checkpoint)
            state = TrainState.start(self.config)
            state.load_state(checkpoint.state)
            in_flight = checkpoint.state.get("in_flight", {})
            state.in_flight = InFlight.from_checkpoint(in_flight, checkpoint.tensors, self.prompts, self.tokenizer)
            self.optimizer.load_state_tensors(checkpoint.tensors, state.updates)
        except _UNFIT as error:
            # or1's own errors are about settings that do not fit, and an older checkpoint would not fit either.
            if isinstance(error, Or1Error) and not isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"the checkpoint of step {checkpoint.step} does not fit this run ({type(error).__name__}: {error}); it "
                "was altered, or another or1 wrote it"
            ) from error
        return state

    def _fit_to_data(self, state: TrainState, message: Callable[[str], None]) -> None:
        """Adapt the state to data that lost prompts since the checkpoint."""
        if lost := state.in_flight.lost:
            message(f"{lost} groups under way are dropped: data.train no longer has their prompts")
        size, sampler = len(self.prompts), state.sampler
        if sampler.cursor >= size:
            state.sampler = SamplerState(sampler.epoch + 1, 0)
            message(
                f"the data has {size} prompts and {sampler.cursor} of the epoch were taken before; "
                f"epoch {state.sampler.epoch} begins"
            )


def _require_counts(checkpoint: Checkpoint) -> None:
    """Raise ValueError for state that `TrainState` would accept and that no run writes."""
    state = checkpoint.state
    if missing := sorted(_REQUIRED - state.keys()):
        raise ValueError(f"its state lacks {', '.join(missing)}")
    counts: dict[str, Any] = {key: state.get(key, 0) for key in ("policy_version", "updates", "nonfinite_in_a_row")}
    counts |= {f"sampler.{key}": state["sampler"][key] for key in ("epoch", "cursor")}
    counts |= {f"budget.{key}": value for key, value in state.get("budget", {}).items()}
    counts |= {f"totals.{key}": value for key, value in state["totals"].items()}
    counts |= {f"watch.{key}": value for key, value in state["watch"]["beyond"].items()}
    counts |= {f"stages.{key}": state["stages"][key] for key in ("index", "began")}
    for name, value in counts.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}, which is no count")
    if state["step"] != checkpoint.step:
        raise ValueError(f"its state is of step {state['step']!r}")
    if not all(isinstance(each, str) for each in state.get("inputs", {}).values()):
        raise ValueError("inputs holds other things than fingerprints")
