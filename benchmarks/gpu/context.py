"""Parts of the GPU checks by name, and the context that each part receives."""

import time
from dataclasses import dataclass
from pathlib import Path

# A part stops itself after the first limit and is killed at the second; both well under 8 minutes.
SOFT_LIMIT_S, HARD_LIMIT_S = 380, 440

# name -> (module, function). The function takes a Context; see there. Add a part with one line.
PARTS: dict[str, tuple[str, str]] = {
    "kernels": ("benchmarks.gpu.kernels", "run"),
    "rows": ("benchmarks.gpu.rows", "run"),
    "head-7b": ("benchmarks.gpu.head", "run_7b"),
    "head-1.5b": ("benchmarks.gpu.head", "run_1_5b"),
    "head-32b": ("benchmarks.gpu.head", "run_32b"),
    "step-1.5b": ("benchmarks.gpu.step", "run_1_5b"),
    "step-7b": ("benchmarks.gpu.step", "run_7b"),
    "longest-1.5b": ("benchmarks.gpu.step", "run_longest_1_5b"),
    "longest-7b": ("benchmarks.gpu.step", "run_longest_7b"),
    "train": ("benchmarks.gpu.train", "run"),
}


@dataclass
class Context:
    """What a part gets: where to write, whether it rehearses on a CPU, and when to stop starting new work.

    Call add(row) for each finished measurement or check; a row with "ok" False fails the part, one with "skipped" is
    listed as such. Everything is on disk when add returns.
    """

    name: str
    out: Path
    rehearse: bool
    deadline: float
    rows: list[dict]

    @property
    def device(self):
        """The torch device of this run."""
        import torch

        return torch.device("cpu" if self.rehearse else "cuda")

    def late(self) -> bool:
        """Whether the part's time is up; then it should leave the rest out with skip()."""
        return time.monotonic() > self.deadline

    def add(self, row: dict) -> None:
        """Keep a row, on disk and on the terminal."""
        from benchmarks.lib.results import write_json

        self.rows.append(row)
        write_json(self.out / f"{self.name}.json", self.rows, part=self.name, rehearsal=self.rehearse)
        words = (
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in row.items()
            if not isinstance(v, (list, dict))
        )
        print("  " + " ".join(words), flush=True)

    def check(self, what: str, ok: bool, **numbers: object) -> None:
        """A row that must hold."""
        self.add({"check": what, "ok": bool(ok), **numbers})

    def skip(self, what: str, why: str) -> None:
        """A row that says what was not run, once for each reason."""
        row = {"skipped": what, "why": why}
        if row not in self.rows:
            self.add(row)
