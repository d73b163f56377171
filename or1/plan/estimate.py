"""The plan of a config on a device: memory and time of every stage, the largest packed row, and a remedy."""

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
    """The step of a stage, its memory and its time."""

    work: Workload
    memory: MemoryPlan
    time: StepTime


@dataclass(frozen=True)
class Plan:
    """The values that `or1 plan` prints. Bytes are of one GPU.

    stages          estimates in order
    largest_tokens  the largest optim.max_tokens_per_rank whose updates fit, a multiple of 256; 0 if no row fits
    longest         tokens of the longest possible sequence, which a packed row must hold
    remedy          --set options that make the plan fit; empty if the plan fits, None if no known option helps
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
        """The stage with the highest peak; of equal stages the last."""
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
    plan = Plan(
        config=config, shape=shape, device=device, choices=choices, stages=stages, largest_tokens=0, longest=longest
    )
    work = plan.heaviest.work
    plan = replace(plan, largest_tokens=largest_row(_peak(shape, device, choices, work, "update"), device.usable))
    return plan if plan.fits else replace(plan, remedy=_remedy(plan, work))


def largest_row(peak_of: Callable[[int], int], usable: int) -> int:
    """Return the largest row in tokens, a multiple of 256, whose peak is at most `usable` bytes; 0 if no row fits.

    peak_of  bytes at the peak by the tokens of a row, monotonic
    """
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
    """Return the function from tokens of a packed row to bytes at the peak of `phase` (None: of the whole step)."""

    def peak_of(tokens: int) -> int:
        memory = plan_memory(shape, replace(choices, max_tokens=tokens), device, work)
        return max(p.total for p in memory.phases if phase in (None, p.name))

    return peak_of


def _remedy(plan: Plan, work: Workload) -> tuple[str, ...] | None:
    """Return the fewest known changes that make the plan fit: a smaller row, then options, then more GPUs."""
    choices = plan.choices
    taken: list[str] = []
    while (row := _fitting_row(plan, choices, work)) is None:
        options = list(alternatives(plan.config, choices, work))
        best = next((option for option in options if _fitting_row(plan, option[1], option[2]) is not None), None)
        if best is None:
            peaks = [_longest_peak(plan, option[1], option[2]) for option in options]
            if options and min(peaks) < _longest_peak(plan, choices, work):
                best = options[peaks.index(min(peaks))]
            elif plan.device.is_gpu:
                best = _twice_the_gpus(choices, work)
        if best is None:
            return None
        text, choices, work = best
        # A later value of the same key, such as a batch halved again, replaces the earlier one.
        taken = [t for t in taken if t.partition("=")[0] != text.partition("=")[0]] + [text]
    return tuple(taken if row == choices.max_tokens else [*taken, f"optim.max_tokens_per_rank={row}"])


def _fitting_row(plan: Plan, choices: Choices, work: Workload) -> int | None:
    """Return the row of `choices` if it fits, else the largest row that fits; None if no row holds a whole sequence."""
    peak_of = _peak(plan.shape, plan.device, choices, work)
    if peak_of(choices.max_tokens) <= plan.device.usable:
        return choices.max_tokens
    row = largest_row(peak_of, plan.device.usable)
    return min(row, choices.max_tokens) if row >= plan.longest else None


def _longest_peak(plan: Plan, choices: Choices, work: Workload) -> int:
    """Return the bytes at the peak with rows of the longest possible sequence."""
    return _peak(plan.shape, plan.device, choices, work)(plan.longest)


def _twice_the_gpus(choices: Choices, work: Workload) -> tuple[str, Choices, Workload] | None:
    if choices.gpus >= _MOST_GPUS:
        return None
    gpus = 2 * choices.gpus
    fewer = min(work.generated_together, -(-work.sequences // gpus))
    return f"--gpus={gpus}", replace(choices, gpus=gpus), replace(work, generated_together=fewer)
