"""Settings and cases of the head benchmark, and one row of its table: time, memory, errors against fp64."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.head.variants import VARIANTS, Variant
from benchmarks.lib import measure
from benchmarks.lib.problems import MODELS, SMALL, TASKS, Problem, Shape, errors, make_problem, truth
from benchmarks.real import inputs

GEMMS = "three bare GEMMs"
# Variants that hold several copies of the logits are skipped above this size of one fp32 copy.
_FULL_LOGITS_BYTES = {"cuda": 22 << 30, "cpu": 1 << 30}
_SAMPLE_ROWS = 256
# Only these variants are measured on all their tasks; others on their first, since more would add no information.
_EVERY_TASK = ("or1", "naive torch", "TRL default", "TRL chunked")


@dataclass(frozen=True)
class Setting:
    """Setting in which all variants are compared. `tokens` includes masked rows.

    real  file of benchmarks.real.make, whose section `logits` names after "real "; None: random inputs
    """

    shape: Shape
    tokens: int
    logits: str = "peaked"
    masked: float = 0.0
    dtype: torch.dtype = torch.float32
    tf32: bool = False
    real: Path | None = None

    def __str__(self) -> str:
        words = [
            self.shape.name,
            str(self.tokens),
            self.logits,
            f"{self.masked:.0%} masked",
            str(self.dtype).removeprefix("torch."),
        ]
        return " ".join([*words, "TF32"] if self.tf32 else words)

    def problem(self, device: torch.device) -> Problem:
        """Return the inputs."""
        if self.real is not None:
            section = self.logits.removeprefix(inputs.PREFIX)
            return inputs.load(self.real).problem(section, self.tokens, dtype=self.dtype, device=device)
        return make_problem(
            self.shape, self.tokens, logits=self.logits, masked=self.masked, dtype=self.dtype, device=device
        )


def settings(device: torch.device, models: tuple[Shape, ...] = MODELS) -> list[Setting]:
    """Return the settings for a device, most informative first: bf16 models on a GPU, a small head on a CPU."""
    if device.type == "cuda":
        bf16 = {"dtype": torch.bfloat16}
        kinds = [
            ("peaked", 0.0, False),
            ("peaked", 0.0, True),
            ("peaked", 0.5, False),
            ("flat", 0.0, False),
            ("flat", 0.5, False),
            ("flat", 0.0, True),
            ("peaked", 0.5, True),
            ("flat", 0.5, True),
        ]
        grid = [
            Setting(m, t, logits, masked, tf32=tf32, **bf16)
            for logits, masked, tf32 in kinds
            for t in (32768, 8192)
            for m in models
        ]
        # More sizes for the plot of time and memory against tokens.
        return grid + [Setting(m, t, **bf16) for t in (2048, 16384) for m in models]
    grid = [Setting(SMALL, 512, logits, masked) for logits in ("peaked", "flat") for masked in (0.0, 0.5)]
    return [*grid, *(Setting(SMALL, tokens) for tokens in (1024, 2048)), Setting(SMALL, 512, dtype=torch.bfloat16)]


def real_settings(path: Path, device: torch.device) -> list[Setting]:
    """Return the settings of a file of real inputs: each section, in bf16, and on a CPU in fp32 too."""
    given = inputs.load(path)
    tokens = 8192 if device.type == "cuda" else 512
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    return [
        Setting(given.shape, tokens, inputs.PREFIX + section, given.masked(section), dtype, real=path)
        for section in given.sections
        for dtype in dtypes
    ]


def cases(setting: Setting) -> Iterator[tuple[Variant, str]]:
    """Yield the variants and tasks to measure in a setting. With TF32, only variants that TF32 affects."""
    for variant in VARIANTS.values():
        if not setting.tf32 or variant.tf32:
            for task in TASKS if variant.name in _EVERY_TASK else variant.tasks[:1]:
                if task in variant.tasks:
                    yield variant, task


def why_skipped(variant: Variant, setting: Setting, device: torch.device) -> str | None:
    """Return the reason why a variant is not measured in a setting, or None."""
    logits_bytes = 4 * setting.tokens * setting.shape.vocab
    if variant.full_logits and logits_bytes > _FULL_LOGITS_BYTES[device.type]:
        return f"it holds [tokens, vocab] several times, {logits_bytes / 2**30:.0f} GiB each in fp32"
    return variant.why_not(device)


def bare_gemms(problem: Problem):
    """Return a function that runs only the three GEMMs over the unmasked rows, a lower bound on the time."""
    hidden = problem.hidden[problem.live] if problem.masked else problem.hidden
    return measure.bare_gemms(hidden, problem.weight)


def error_of(variant: Variant, task: str, problem: Problem) -> dict[str, float | None]:
    """Return the variant's errors against fp64 on a sample of the problem's rows."""
    sample = problem.sample(_SAMPLE_ROWS)
    return errors(variant.runner(sample, task)(), truth(sample, task))


def why_wrong(variant: Variant, error: dict[str, float | None], plain: dict[str, float | None], eps: float) -> str:
    """Return why a variant must not be timed: an error beyond its factor times plain torch's; "" if there is none.

    plain  errors of naive torch in the same dtype, whose unit of rounding is `eps`
    """
    for name, value in error.items():
        peer = plain[name]
        if value is None or peer is None:
            continue
        floor = max(variant.floor, 2 * eps) if name.startswith("d") else 1e-4
        # A nan is beyond every limit.
        if not value <= variant.factor * peer + floor:
            return f"{name} is off by {value:.1e} against fp64; plain torch is off by {peer:.1e}"
    return ""


def row(
    setting: Setting,
    variant: Variant,
    task: str,
    problem: Problem,
    *,
    times_s: list[float],
    gemm_times_s: list[float],
    error: dict[str, float | None] | None = None,
) -> dict:
    """Return a table row: best time, peak extra memory, errors on a sample of rows, TFLOP/s of three GEMMs.

    error  from `error_of`, computed here if None
    """
    peak = measure.peak_extra_bytes(variant.runner(problem, task), problem.hidden.device)
    best, floor = min(times_s), min(gemm_times_s)
    return describe(setting) | {
        "variant": variant.name,
        "task": task,
        "ms": 1e3 * best,
        "ms_all": [1e3 * t for t in times_s],
        "peak_extra_gib": peak / 2**30,
        "tflops": problem.flops / best / 1e12,
        "gemms_ms": 1e3 * floor,
        "to_gemms": best / floor,
        "error": error_of(variant, task, problem) if error is None else error,
    }


def describe(setting: Setting) -> dict:
    """Return the setting as columns of a row."""
    s = setting
    return {
        "shape": s.shape.name,
        "tokens": s.tokens,
        "hidden": s.shape.hidden,
        "vocab": s.shape.vocab,
        "logits": s.logits,
        "masked": s.masked,
        "dtype": str(s.dtype).removeprefix("torch."),
        "tf32": s.tf32,
    }
