"""Parts of the GPU checks by name, and the context that each part receives."""

import time
from dataclasses import dataclass, field
from pathlib import Path

# A part starts no new work after the first limit and is killed at the second. Both are well under 8 minutes.
SOFT_LIMIT_S, HARD_LIMIT_S = 360, 420
# With --quick, all parts together, the build included.
QUICK_S = 300


@dataclass(frozen=True)
class Part:
    """A part: the function that takes a Context, what must be importable first, and its seconds under --quick.

    quick_s  0: not part of --quick
    """

    module: str
    function: str
    needs: tuple[str, ...] = ()
    quick_s: int = 0


_GPU = ("triton",)
_TRAINER = ("triton", "pydantic", "transformers", "or1_kernels._native")

# In the order of a first hour on a GPU: what answers most, soonest. A new part is one line here.
PARTS: dict[str, Part] = {
    "rows": Part("benchmarks.gpu.rows", "run", _GPU, quick_s=30),
    "kernels": Part("benchmarks.gpu.kernels", "run", _GPU, quick_s=35),
    "attention": Part("benchmarks.gpu.attention", "run", quick_s=35),
    "head-7b": Part("benchmarks.gpu.head", "run_7b", _GPU, quick_s=75),
    "head-8b": Part("benchmarks.gpu.head", "run_8b", _GPU, quick_s=35),
    "step-7b": Part("benchmarks.gpu.step", "run_7b", _TRAINER, quick_s=90),
    "head-1.5b": Part("benchmarks.gpu.head", "run_1_5b", _GPU),
    "step-1.5b": Part("benchmarks.gpu.step", "run_1_5b", _TRAINER),
    "longest-7b": Part("benchmarks.gpu.step", "run_longest_7b", _TRAINER),
    "longest-1.5b": Part("benchmarks.gpu.step", "run_longest_1_5b", _TRAINER),
    "head-32b": Part("benchmarks.gpu.head", "run_32b", _GPU),
    "syncs": Part("benchmarks.gpu.syncs", "run", _TRAINER),
    "train": Part("benchmarks.gpu.train", "run", (*_TRAINER, "math_verify")),
}
# The headline figures first, since --quick has one limit for all parts.
QUICK = ("head-7b", "head-8b", "step-7b", "attention", "rows", "kernels")


@dataclass
class Context:
    """Context of one part: output folder, rehearsal flag, and the time after which no new work starts.

    Call add(row) for each finished measurement or check. A row with "ok" False fails the part. A row with "skipped"
    is listed as skipped. All rows are on disk when add returns.

    quick  only the figures of the part's headline
    """

    name: str
    out: Path
    rehearse: bool
    deadline: float
    rows: list[dict]
    quick: bool = False
    began: float = field(default_factory=time.monotonic)

    @property
    def device(self):
        """Torch device of this run."""
        import torch

        return torch.device("cpu" if self.rehearse else "cuda")

    def late(self) -> bool:
        """Return True after the deadline; the part should then skip() its remaining work."""
        return time.monotonic() > self.deadline

    def left(self) -> float:
        """Return the seconds before the deadline."""
        return self.deadline - time.monotonic()

    def add(self, row: dict) -> None:
        """Write a row to disk and to the terminal, with the prediction for it where there is one."""
        from benchmarks.gpu.predictions import with_prediction

        row = row if self.rehearse else with_prediction(row, self.name)
        self.rows.append(row)
        self.write()
        words = (
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in row.items()
            if not isinstance(v, (list, dict)) or k == "predicted"
        )
        print("  " + " ".join(words), flush=True)

    def write(self, ended: str = "running") -> None:
        """Write the part's file. `ended` "running" is replaced when the part ends, by this process or its parent."""
        from benchmarks.lib.results import write_json

        write_json(
            self.out / f"{self.name}.json",
            self.rows,
            part=self.name,
            rehearsal=self.rehearse,
            quick=self.quick,
            ended=ended,
            seconds=round(time.monotonic() - self.began, 1),
        )

    def check(self, what: str, ok: bool, **numbers: object) -> None:
        """Add a row for a check, which must hold."""
        self.add({"check": what, "ok": bool(ok), **numbers})

    def skip(self, what: str, why: str) -> None:
        """Add a row for work that was not run, once for each reason."""
        row = {"skipped": what, "why": why}
        if row not in self.rows:
            self.add(row)
