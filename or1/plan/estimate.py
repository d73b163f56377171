"""A config and a device -> a plan: memory and time of every stage, the largest packed row, and what makes it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from or1.config import Config
from or1.plan.choices import Choices, Workload, alternatives, choices_of, workload_of
from or1.plan.devices import Device
from or1.plan.memory import MemoryPlan, plan_memory
from or1.plan.shapes import ModelShape
from or1.plan.timing import StepTime, step_time

# Rows are proposed in steps of this many tokens.
_STEP = 256
_MOST_TOKENS = 1 << 22
_MOST_GPUS = 1024


@dataclass(frozen=True)
class StageEstimate:
    """One stage: its step, its memory and its time."""

    work: Workload
    memory: MemoryPlan
    time: StepTime


@dataclass(frozen=True)
class Plan:
    """What `or1 plan` prints. Bytes are of one GPU.

    stages          estimates in order
    largest_tokens  the largest optim.max_tokens_per_rank whose updates fit, a multiple of 256; 0 if none does
    longest         tokens of the longest sequence that a stage may make, which is the least that a row must hold
    remedy          --set options that make the plan fit, where it does not; None if nothing known does
    """

    config: Config
    shape: ModelShape
    device: Device
    choices: Choices
    stages: tuple[StageEstimate, ...]
    largest_tokens: int
    longest: int
    remedy: tuple[str, ...] | None = ()

    @property
    def heaviest(self) -> StageEstimate:
        """The stage with the highest peak, the last of equals."""
        return max(reversed(self.stages), key=lambda stage: stage.memory.peak.total)

    @property
    def fits(self) -> bool:
        """Whether every phase of every stage fits the device."""
        return self.heaviest.memory.peak.total <= self.device.usable


def make_plan(
    config: Config, shape: ModelShape, device: Device, gpus: int = 1, mean_response: int | None = None
) -> Plan:
    """Plan every stage of `config` on `gpus` devices. mean_response: tokens; None: half of each stage's limit."""
    choices = choices_of(config, device, gpus)
    works = [workload_of(config, stage, device, gpus, mean_response) for stage in config.stage]
    stages = tuple(
        StageEstimate(w, plan_memory(shape, choices, device, w), step_time(shape, choices, device, w)) for w in works
    )
    longest = config.data.max_prompt_tokens + max(stage.max_response_tokens for stage in config.stage)
    plan = Plan(config, shape, device, choices, stages, 0, longest)
    work = plan.heaviest.work
    plan = replace(plan, largest_tokens=largest_row(_peak(shape, device, choices, work, "update"), device.usable))
    return plan if plan.fits else replace(plan, remedy=_remedy(plan, work))


def largest_row(peak_of: Callable[[int], int], usable: int) -> int:
    """The largest row in tokens, a multiple of 256, whose peak is within `usable` bytes; 0 if none is."""
    low, high = 0, _MOST_TOKENS // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        if peak_of(middle * _STEP) <= usable:
            low = middle
        else:
            high = middle - 1
    return low * _STEP


def _peak(
    shape: ModelShape, device: Device, choices: Choices, work: Workload, phase: str | None = None
) -> Callable[[int], int]:
    """Bytes at the peak of `phase` (None: of the whole step) by the tokens of a packed row."""

    def peak_of(tokens: int) -> int:
        memory = plan_memory(shape, replace(choices, max_tokens=tokens), device, work)
        return max(p.total for p in memory.phases if phase in (None, p.name))

    return peak_of


def _remedy(plan: Plan, work: Workload) -> tuple[str, ...] | None:
    """The fewest known changes that make it fit: a smaller row, then options, then more GPUs."""
    shape, device, choices = plan.shape, plan.device, plan.choices

    def fitting_row(choices: Choices, work: Workload) -> int | None:
        """The row to use: the present one if it fits, else the largest that holds the longest sequence."""
        peak_of = _peak(shape, device, choices, work)
        if peak_of(choices.max_tokens) <= device.usable:
            return choices.max_tokens
        row = largest_row(peak_of, device.usable)
        return min(row, choices.max_tokens) if row >= plan.longest else None

    def total(option: tuple[str, Choices, Workload]) -> int:
        return _peak(shape, device, option[1], option[2])(plan.longest)

    taken: list[str] = []
    while fitting_row(choices, work) is None:
        options = list(alternatives(plan.config, choices, work))
        best = next((o for o in options if fitting_row(o[1], o[2]) is not None), None)
        if best is None:
            now = total(("", choices, work))
            options = [o for o in options if total(o) < now]
            best = min(options, key=total, default=None)
            if best is None and device.is_gpu:
                best = _twice_the_gpus(choices, work)
        if best is None:
            return None
        text, choices, work = best
        # A later value of the same key, such as a batch halved again, replaces the earlier one.
        taken = [t for t in taken if t.partition("=")[0] != text.partition("=")[0]] + [text]
    row = fitting_row(choices, work)
    return tuple(taken if row == choices.max_tokens else [*taken, f"optim.max_tokens_per_rank={row}"])


def _twice_the_gpus(choices: Choices, work: Workload) -> tuple[str, Choices, Workload] | None:
    if choices.gpus >= _MOST_GPUS:
        return None
    gpus = 2 * choices.gpus
    fewer = min(work.generated_together, -(-work.sequences // gpus))
    return f"--gpus={gpus}", replace(choices, gpus=gpus), replace(work, generated_together=fewer)
