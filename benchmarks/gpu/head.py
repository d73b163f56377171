"""GPU part: the head of one model size beside its peers, most informative settings first, until the deadline."""

import gc

import torch

from benchmarks.gpu.context import Context
from benchmarks.head import cases as head
from benchmarks.lib import measure
from benchmarks.lib.problems import MODELS, Shape


def run_1_5b(context: Context) -> None:
    """Run the part for H = 1536, V = 151936."""
    _run(context, MODELS[0])


def run_7b(context: Context) -> None:
    """Run the part for H = 3584, V = 152064."""
    _run(context, MODELS[1])


def run_32b(context: Context) -> None:
    """Run the part for H = 5120, V = 152064."""
    _run(context, MODELS[2])


def _run(context: Context, model: Shape) -> None:
    if context.rehearse:
        small = Shape(model.name, model.hidden // 64, 1031)
        settings = [head.Setting(small, 64), head.Setting(small, 64, masked=0.5, dtype=torch.bfloat16)]
    else:
        settings = head.settings(context.device, (model,))
    for setting in settings:
        _measure(context, setting)


def _measure(context: Context, setting: head.Setting) -> None:
    device = context.device
    if context.late():
        context.skip(str(setting), "the part's time is up")
        return
    problem = setting.problem(device)
    gemms = head.bare_gemms(problem)
    for variant, task in head.cases(setting):
        why = head.why_skipped(variant, setting, device)
        if why is None and context.late():
            why = "the part's time is up"
        if why is not None:
            context.skip(f"{variant.name}, {setting}" if "time is up" in why else variant.name, why)
            continue
        try:
            with measure.tf32(setting.tf32):
                run = variant.runner(problem, task)
                times = measure.interleaved({"gemms": gemms, "variant": run}, device, rounds=3)
                row = head.row(setting, variant, task, problem, times_s=times["variant"], gemm_times_s=times["gemms"])
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            # A peer that fails on this machine is a result. A failure of or1 fails the part.
            if variant.name.startswith("or1"):
                raise
            context.skip(f"{variant.name}, {task}", f"{type(error).__name__}: {str(error).splitlines()[:1]}")
            row = None
        if row is not None:
            context.add(row)
        del row
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
