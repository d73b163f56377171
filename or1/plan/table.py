"""The plan as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from or1.core.text import count_text, duration, visible
from or1.plan.devices import GIB
from or1.plan.estimate import Plan
from or1.plan.memory import COMPONENTS, checkpoint_bytes, push_bytes, trained_sizes
from or1.plan.timing import StepTime
from or1.report.console import default_console, print_pairs
from or1.report.run_plan import stage_settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WHAT_TO_CHANGE = {
    "weights": "more GPUs (--gpus) shard them",
    "reference model": "loss.kl_coef = 0 needs none, and neither do adapters ([model.lora])",
    "gradients": 'optim.grad_dtype = "bfloat16" or more GPUs',
    "optimizer": 'optim.optimizer = "adamw8bit" or "offload", or more GPUs',
    "activations": "gradient checkpointing, or a smaller optim.max_tokens_per_rank",
    "head buffers": "a smaller optim.max_tokens_per_rank",
    "KV cache": "a smaller rollout.batch_size, or less of the GPU for vLLM",
    "gathered layers": "fewer, larger GPUs",
    "generation": "a smaller rollout.batch_size or data.max_prompt_tokens, or less of the GPU for vLLM",
    "batch": "a smaller minibatch_prompts, or more GPUs",
    "temporaries": "more GPUs",
    "matrix products": "a faster GPU, or none of the recomputation of gradient checkpointing if memory allows",
    "attention": "a shorter context: stages that grow it",
    "LM head": "nothing in the config: it grows with vocabulary and hidden size",
    "memory traffic": "Liger's kernels (model.liger)",
    "collectives": "larger packed rows (optim.max_tokens_per_rank), or fewer GPUs",
    "weight sync": "more steps' worth of responses in a step",
    "old log-probs": "one optimizer step a rollout, which needs none",
    "reference log-probs": "loss.kl_coef = 0, which needs none",
}


def print_plan_table(plan: Plan, why_device: str, console: Console | None = None) -> None:
    """Print memory by phase, time by stage, the dominant parts, and the largest row that fits."""
    console = console or default_console()
    for line in _heading(plan, why_device):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    print_pairs(stage_settings(plan.config), console)
    for line in conclusions(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _heading(plan: Plan, why_device: str) -> Iterator[str]:
    shape, device, choices = plan.shape, plan.device, plan.choices
    gpus = "" if choices.gpus == 1 else f"{choices.gpus} x "
    groups = f", sharded over groups of {choices.shard_gpus}" if choices.shard_gpus else ""
    yield f"or1 plan: {visible(shape.name)}, {count_text(shape.parameters)} parameters, on {gpus}{device.name}{groups}"
    yield (
        f"  device       {device.memory / GIB:.1f} GiB, {device.usable / GIB:.1f} usable, "
        f"{device.tflops:g} TFLOP/s, {device.bandwidth:g} GB/s ({why_device})"
    )
    eff = device.efficiency
    head = "" if eff.head is None else f", {eff.head:.0%} in the LM head"
    yield (
        f"  {'measured' if eff.source else 'assumed ':8}     {eff.matmul:.0%} of that in matrix products, "
        f"{eff.attention:.0%} in attention{head}, {eff.memory:.0%} of the bandwidth"
    )
    if eff.source:
        yield f"               measured: {visible(eff.source)}; the others are assumed"
    work = plan.heaviest.work
    yield (
        f"               prompts of {work.mean_prompt:,.0f} tokens, responses of half their limit unless "
        "--mean-response is given, the longest at the limit; no group rejected"
    )
    yield (
        "               other: old and reference log-probs if any are needed, and the weights to the engine; "
        "verifiers, checkpoints and evaluations are not planned"
    )
    yield (
        f"  row          {choices.max_tokens:,} tokens, checkpointing {choices.checkpointing}, optimizer "
        f"{choices.optimizer}, weights {8 * choices.weight} bit, gradients {8 * choices.grad} bit"
    )
    if (adapters := choices.adapters) is not None:
        trained, bits = sum(trained_sizes(shape, choices)), 4 if adapters.four_bit else 8 * choices.weight
        sizes = (checkpoint_bytes(shape, choices) / GIB, push_bytes(shape, choices) / GIB)
        yield (
            f"  adapters     rank {adapters.rank}, {count_text(trained)} trained parameters "
            f"({trained / shape.parameters:.2%}) in 32 bit, frozen layers in {bits} bit; the LM head runs two GEMMs "
            "of three"
        )
        yield f"               checkpoint {sizes[0]:,.2f} GiB, push to an engine of its own {sizes[1]:,.2f} GiB"


def _memory_table(plan: Plan) -> Table:
    phases = plan.heaviest.memory.phases
    peak = plan.heaviest.memory.peak
    unit, name = (GIB, "GiB") if peak.total > GIB else (GIB / 1024, "MiB")
    table = _table(f"{name} a GPU", *(phase.name for phase in phases))
    for component in COMPONENTS:
        sizes = [phase.parts.get(component, 0) for phase in phases]
        if any(sizes):
            table.add_row(component, *(f"{size / unit:,.2f}" if size else "-" for size in sizes))
    table.add_section()
    table.add_row("peak", *(_bold(f"{phase.total / unit:,.2f}", phase is peak) for phase in phases))
    for part, size in plan.heaviest.memory.host.items():
        table.add_row(f"host: {part}", f"{size / unit:,.2f}", *("" for _ in phases[1:]))
    return table


def _bold(text: str, on: bool) -> str:
    return f"[bold]{text}[/bold]" if on else text


def _time_table(plan: Plan) -> Table:
    table = _table("stage", "responses", "limit", "step", "rollout", "update", "other", "shares", "tokens/s", "MFU")
    for number, stage in enumerate(plan.stages, 1):
        time, work = stage.time, stage.work
        seconds = time.split.values()
        shares = " ".join(f"{s / time.total:.0%}" for s in seconds)
        table.add_row(
            str(number),
            f"{work.sequences:,}",
            f"{work.max_response:,}",
            duration(time.total),
            *map(duration, seconds),
            shares,
            count_text(time.tokens_per_s),
            f"{time.mfu:.0%}",
        )
    return table


def _table(first: str, *others: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="dim")
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="right")
    return table


def conclusions(plan: Plan) -> list[str]:
    """Return one line each about the dominant memory, the dominant time, and the largest row that fits."""
    peak, slow = plan.heaviest.memory.peak, plan.stages[-1].time
    part, slowest = peak.dominant, slow.dominant
    lines = [
        f"Memory: the {peak.name} phase needs most, {peak.total / GIB:.1f} GiB where {plan.device.usable / GIB:.1f} "
        f"are usable; {peak.parts[part] / peak.total:.0%} of that is {part}. To change it: {_WHAT_TO_CHANGE[part]}.",
        f"Time: {slow.parts[slowest] / slow.total:.0%} of the last stage's step is {slowest}. "
        f"To change it: {_advice_on_time(plan, slowest)}.",
    ]
    if ahead := plan.stages[-1].work.steps_ahead:
        lines.append(_ahead(slow, ahead, shared=plan.stages[-1].work.engine != "server"))
    if plan.largest_tokens:
        lines.append(
            f"Largest optim.max_tokens_per_rank that fits: {plan.largest_tokens:,} (the longest sequence has "
            f"up to {plan.longest:,} tokens)."
        )
    else:
        lines.append("No optim.max_tokens_per_rank fits: weights, gradients and optimizer alone are too much.")
    return lines


def _ahead(time: StepTime, steps: int, *, shared: bool) -> str:
    """Return what rollouts ahead of their step change. shared: engine and trainer use the same GPUs."""
    text = f"Rollouts up to {steps} step{'s' * (steps > 1)} ahead (rollout.max_staleness): the last stage's step takes "
    if shared:
        return text + (
            f"{duration(time.overlapped)} to {duration(time.total)}, because rollout and update share the GPUs. The "
            "table has one after the other."
        )
    return text + (
        f"{duration(time.overlapped)}, the longer of rollout and update and then the push, instead of "
        f"{duration(time.total)} as in the table, one after the other."
    )


def _advice_on_time(plan: Plan, part: str) -> str:
    if part == "generation":
        return (
            'rollout.engine = "vllm", or a larger rollout.batch_size, if it fits'
            if plan.heaviest.work.engine == "hf"
            else "a shorter context: stages that grow it; rollout.overlap or partial_tokens, which do not wait for "
            "the longest response; more GPUs, which do"
        )
    if part == "optimizer":
        return (
            "more prompts a minibatch"
            if plan.choices.optimizer != "offload"
            else 'optim.optimizer = "adamw8bit", which stays on the GPU'
        )
    return _WHAT_TO_CHANGE[part]


def verdict(plan: Plan) -> str:
    """Return why a plan does not fit, and the options that make the plan fit."""
    over = plan.heaviest.memory.peak.total - plan.device.usable
    text = f"It does not fit: {over / GIB:.1f} GiB too much on {plan.device.name}."
    if plan.remedy is None:
        return text + " No known option makes it fit; take a larger device (--device) or a smaller model."
    options = [t if t.startswith("--") else f"--set {t}" for t in plan.remedy]
    return f"{text} It would with: {' '.join(options)}"


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the numbers of a plan for JSON: bytes, seconds, tokens."""
    return {
        "model": plan.shape.name,
        "parameters": plan.shape.parameters,
        "trained_parameters": sum(trained_sizes(plan.shape, plan.choices)),
        "checkpoint_bytes": checkpoint_bytes(plan.shape, plan.choices),
        "push_bytes": push_bytes(plan.shape, plan.choices),
        "device": asdict(plan.device),
        "usable_bytes": plan.device.usable,
        "gpus": plan.choices.gpus,
        "shard_gpus": plan.choices.shards,
        "fits": plan.fits,
        "largest_max_tokens_per_rank": plan.largest_tokens,
        "remedy": plan.remedy and list(plan.remedy),
        "stages": [
            {
                "phases": {phase.name: phase.parts for phase in stage.memory.phases},
                "host": stage.memory.host,
                "peak_bytes": stage.memory.peak.total,
                "seconds": stage.time.parts,
                "split_seconds": stage.time.split,
                "tokens": stage.time.tokens,
                "tokens_per_s": stage.time.tokens_per_s,
                "mfu": stage.time.mfu,
                "settings": settings.own_settings(),
            }
            for stage, settings in zip(plan.stages, plan.config.stage, strict=True)
        ],
    }
