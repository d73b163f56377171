"""Parts of the GPU checks by name, and the context that each part receives."""

import time
from dataclasses import dataclass
from pathlib import Path

# A part starts no new work after the first limit and is killed at the second. Both are well under 8 minutes.
SOFT_LIMIT_S, HARD_LIMIT_S = 380, 440

# name -> (module, function that takes a Context). A new part is one line here.
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
    """Context of one part: output folder, rehearsal flag, and the time after which no new work starts.

    Call add(row) for each finished measurement or check. A row with "ok" False fails the part. A row with "skipped"
    is listed as skipped. All rows are on disk when add returns.
    """

    name: str
    out: Path
    rehearse: bool
    deadline: float
    rows: list[dict]

    @property
    def device(self):
        """Torch device of this run."""
        import torch

        return torch.device("cpu" if self.rehearse else "cuda")

    def late(self) -> bool:
        """Return True after the deadline; the part should then skip() its remaining work."""
        return time.monotonic() > self.deadline

    def add(self, row: dict) -> None:
        """Write a row to disk and to the terminal."""
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
        """Add a row for a check, which must hold."""
        self.add({"check": what, "ok": bool(ok), **numbers})

    def skip(self, what: str, why: str) -> None:
        """Add a row for work that was not run, once for each reason."""
        row = {"skipped": what, "why": why}
        if row not in self.rows:
            self.add(row)
