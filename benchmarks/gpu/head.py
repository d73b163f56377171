"""GPU part: the head of one model size beside its peers, most informative settings first, until the deadline.

A variant is compared with fp64 before it is timed. A peer that misses its limit is a row with the reason and no time.
"""

import gc

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.needs import first_line
from benchmarks.head import cases as head
from benchmarks.head.variants import VARIANTS, Variant
from benchmarks.lib import measure
from benchmarks.lib.problems import MODELS, PUBLISHED, Problem, Shape

_TIME_IS_UP = "the part's time is up"


def run_1_5b(context: Context) -> None:
    """Run the part for H = 1536, V = 151936."""
    _run(context, MODELS[0])


def run_7b(context: Context) -> None:
    """Run the part for H = 3584, V = 152064."""
    _run(context, MODELS[1])


def run_8b(context: Context) -> None:
    """Run the part for H = 4096, V = 151936 at 8192 tokens, the shape of published figures."""
    _run(context, PUBLISHED)


def run_32b(context: Context) -> None:
    """Run the part for H = 5120, V = 152064."""
    _run(context, MODELS[2])


def settings_of(context: Context, model: Shape) -> list[head.Setting]:
    """Return the part's settings. With --quick, or for the published shape, only the headline."""
    if context.rehearse:
        small = Shape(model.name, model.hidden // 64, 1031)
        return [head.Setting(small, 64), head.Setting(small, 64, masked=0.5, dtype=torch.bfloat16)]
    if model == PUBLISHED:
        return [head.Setting(model, 8192, dtype=torch.bfloat16)]
    found = head.settings(context.device, (model,))
    return found[:1] if context.quick else found


def _run(context: Context, model: Shape) -> None:
    for setting in settings_of(context, model):
        _measure(context, setting)


def _measure(context: Context, setting: head.Setting) -> None:
    if context.late():
        context.skip(str(setting), _TIME_IS_UP)
        return
    problem = setting.problem(context.device)
    plain = {t: head.error_of(VARIANTS["naive torch"], t, problem) for t in VARIANTS["naive torch"].tasks}
    for variant, task in head.cases(setting):
        why = head.why_skipped(variant, setting, context.device)
        if why is None and context.late():
            why = _TIME_IS_UP
        if why is not None:
            context.skip(f"{variant.name}, {setting}" if why == _TIME_IS_UP else variant.name, why)
            continue
        row = _checked_row(context, setting, variant, task, problem, plain[task])
        if row is not None:
            context.add(row)
        gc.collect()
        if context.device.type == "cuda":
            torch.cuda.empty_cache()


def _checked_row(
    context: Context, setting: head.Setting, variant: Variant, task: str, problem: Problem, plain: dict
) -> dict | None:
    """Return the row of a variant, or None for a peer that fails on this machine, which is listed as skipped."""
    try:
        with measure.tf32(setting.tf32):
            error = head.error_of(variant, task, problem)
            why = head.why_wrong(variant, error, plain, torch.finfo(setting.dtype).eps)
            if why:
                return head.describe(setting) | {
                    "variant": variant.name,
                    "task": task,
                    "wrong": why,
                    "error": error,
                    # or1 must be right; a peer that is wrong here is a result.
                    **({"ok": False} if variant.name.startswith("or1") else {}),
                }
            fns = {"gemms": head.bare_gemms(problem), "variant": variant.runner(problem, task)}
            times = measure.interleaved(fns, context.device, rounds=2 if context.quick else 3)
            return head.row(
                setting, variant, task, problem, times_s=times["variant"], gemm_times_s=times["gemms"], error=error
            )
    except Exception as error:
        if variant.name.startswith("or1"):
            raise
        context.skip(f"{variant.name}, {task}, {setting}", first_line(error))
        return None
