"""What was predicted before any GPU was used, to be printed beside what is measured.

The predictions are arithmetic on memory bandwidth, instruction counts and GEMM rates, of November 2026. "now" is the
code of that time, "after" the plan. None of them is a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """A range expected for one figure of a row, in the figure's unit.

    part, where  rows that it is for: their part, and the values that their columns must have
    figure       the column
    by_device    lowest and highest value, by text that the device's name contains
    note         what the range assumes
    """

    part: str
    where: dict[str, Any]
    figure: str
    by_device: dict[str, tuple[float, float]] = field(default_factory=dict)
    note: str = ""


def _pass(name: str, h200: tuple[float, float], h100: tuple[float, float], note: str) -> Prediction:
    return Prediction("rows", {"pass": name, "impl": "triton", "rows": 4096}, "ms", {"H200": h200, "H100": h100}, note)


def _step(documents: int, seconds: float, mfu: float) -> list[Prediction]:
    where = {"architecture": "qwen2.5-7b", "engine": "or1", "documents": documents, "row": 32768}
    note = "forward and backward with flash-attention 2, Liger and checkpointing 'layer'; the optimizer is not counted"
    return [
        Prediction("step-7b", where, "seconds", {"H200": (seconds, seconds)}, note),
        Prediction("step-7b", where, "mfu", {"H200": (mfu, mfu)}, note),
    ]


_HEAD = {"variant": "or1", "tokens": 32768, "masked": 0.0, "logits": "peaked", "tf32": False}
_POLICY, _NO_ENTROPY = _HEAD | {"task": "policy"}, _HEAD | {"task": "policy, no entropy"}

PREDICTIONS: tuple[Prediction, ...] = (
    _pass("row_sums", (0.75, 0.88), (0.88, 1.0), "now; 0.61 and 0.86 after"),
    _pass("row_grads bf16", (0.91, 0.91), (1.29, 1.29), "bound by memory"),
    Prediction("head-7b", _POLICY, "to_gemms", {"H200": (1.13, 1.20), "H100": (1.16, 1.22)}, "now; 1.07 to 1.09 after"),
    Prediction("head-7b", _NO_ENTROPY, "to_gemms", {"H200": (1.13, 1.20), "H100": (1.16, 1.22)}, "now; 1.05 after"),
    Prediction("head-7b", _POLICY, "gemms_ms", {"H200": (143, 143), "H100": (143, 143)}, "at 750 TFLOP/s"),
    Prediction("head-1.5b", _POLICY, "to_gemms", {"H200": (1.3, 1.3)}, "now"),
    Prediction("head-1.5b", _POLICY, "gemms_ms", {"H200": (65, 65)}, ""),
    *_step(1, 5.91, 0.35),
    *_step(4, 3.59, 0.44),
    *(
        Prediction("attention", {"backend": backend}, figure, {"H200": (rate, rate), "H100": (rate, rate)}, "a guess")
        for backends, forward, backward in ((("varlen", "flash 2"), 350, 290), (("cudnn", "fa3", "fa4"), 600, 480))
        for backend in backends
        for figure, rate in (("forward_tflops", forward), ("backward_tflops", backward))
    ),
)

# Aims, not predictions: (part, columns, figure, limit on the figure).
TARGETS: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("head-7b", _POLICY, "to_gemms", "at most 1.10"),
    ("head-7b", _NO_ENTROPY, "to_gemms", "at most 1.05"),
    ("head-7b", _POLICY, "peak_extra_gib", "at most 5.6"),
    ("head-8b", {"variant": "or1", "task": "ce"}, "ms", "at most 50 on an H100"),
    ("step-7b", {"engine": "or1", "documents": 1, "row": 32768}, "mfu", "at least 0.45"),
    ("step-7b", {"engine": "or1", "documents": 4, "row": 32768}, "mfu", "at least 0.50"),
    ("step-1.5b", {"engine": "or1", "context": 32768}, "mfu", "at least 0.45"),
)


def with_prediction(row: dict, part: str, device: str | None = None) -> dict:
    """Return the row with "predicted" and "target", dicts by figure, where there are any for it.

    device  its name; None: this machine's
    """
    predicted, target = {}, {}
    for p in PREDICTIONS:
        if p.part == part and p.figure in row and _fits(row, p.where):
            if device is None:
                from benchmarks.lib.measure import device_name

                device = device_name()
            # One device's prediction says little of another's, so it is named.
            for name, (low, high) in p.by_device.items():
                if name in device:
                    span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
                    predicted[p.figure] = f"{span} ({name}, predicted, not measured{'; ' if p.note else ''}{p.note})"
    for wanted, where, figure, limit in TARGETS:
        if wanted == part and figure in row and _fits(row, where):
            target[figure] = limit
    return row | ({"predicted": predicted} if predicted else {}) | ({"target": target} if target else {})


def _fits(row: dict, where: dict[str, Any]) -> bool:
    return all(row.get(k) == v for k, v in where.items())
