"""A run from its newest checkpoint: the state of one that does not fit is told, and the one before is taken."""

from __future__ import annotations

from typing import Any

from or1.core.errors import CheckpointError, Or1Error
from or1.data import SamplerState
from or1.run.checkpoint import Checkpoint, load_checkpoint, load_latest, remove_partials, step_folder
from or1.run.directory import checkpoints_of
from or1.run.in_flight import InFlight
from or1.run.marks import lost_newest
from or1.run.state import TrainState

_REQUIRED = frozenset({"entropy", "policy_version", "sampler", "stages", "step", "totals", "updates", "watch"})
# What state of another shape makes its reader raise; RuntimeError is torch's, for sizes that do not match.
_UNFIT = (ValueError, TypeError, AttributeError, LookupError, OverflowError, RuntimeError)


def restore(trainer: Any, step: int | None) -> TrainState | None:
    """Put the checkpoint of `step` into model, optimizer and budget; of the newest for None. None without one.

    Collective. Raises CheckpointError if there are checkpoints and none can be used.
    """
    folder, world = checkpoints_of(trainer.config.run_path), trainer.world
    found: list[TrainState] = []

    def use(checkpoint: Checkpoint) -> None:
        found[:] = [_fill(trainer, checkpoint)]

    if step == 0:
        return None
    if step is not None:
        try:
            use(load_checkpoint(step_folder(folder, step), world))
        except CheckpointError as error:
            remedy = "restore it, or remove its folder, and the one before is taken"
            raise type(error)(f"{error}; {remedy}") from error
    else:
        if world.is_main:
            remove_partials(folder)
        world.barrier()
        newest, warnings = load_latest(folder, world, use)
        for warning in warnings:
            trainer.display.message(warning)
        if newest is not None and (lost := lost_newest(trainer.config.run_path)):
            trainer.display.message(lost)
    if not found:
        return None
    state: TrainState = found[0]
    trainer.budget.restore(state.budget)
    trainer.engine.update_weights(state.policy_version)
    trainer.display.message(f"resumed after step {state.step}")
    _fit_to_data(trainer, state)
    if change := state.stages.resume(trainer.config, state.step):
        trainer.display.message(change)
    return state


def _fill(trainer: Any, checkpoint: Checkpoint) -> TrainState:
    """Return the state of a checkpoint, its tensors in the optimizer. Raises CheckpointError if they do not fit."""
    try:
        _require_counts(checkpoint)
        state = TrainState.from_json(trainer.config, checkpoint.state)
        in_flight = checkpoint.state.get("in_flight", {})
        prompts = trainer.data.prompts
        state.in_flight = InFlight.from_checkpoint(in_flight, checkpoint.tensors, prompts, trainer.tokenizer)
        trainer.optimizer.load_state_tensors(checkpoint.tensors, state.updates)
    except _UNFIT as error:
        # or1's own errors are of settings that do not fit, and an older checkpoint would not either.
        if isinstance(error, Or1Error) and not isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} does not fit this run ({type(error).__name__}: {error}); it was "
            "altered, or another or1 wrote it"
        ) from error
    return state


def _require_counts(checkpoint: Checkpoint) -> None:
    """Raise ValueError for state that `TrainState` would take and that no run leaves."""
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


def _fit_to_data(trainer: Any, state: TrainState) -> None:
    """Go on with the data there is, if some of it has gone since the checkpoint; say so."""
    if lost := state.in_flight.lost:
        trainer.display.message(f"{lost} groups under way are dropped: data.train no longer has their prompts")
    size, sampler = len(trainer.data.prompts), state.sampler
    if sampler.cursor >= size:
        state.sampler = SamplerState(sampler.epoch + 1, 0)
        trainer.display.message(
            f"the data has {size} prompts and {sampler.cursor} of the epoch were taken before; "
            f"epoch {state.sampler.epoch} begins"
        )
