"""The rehearsal in a process of its own, which `python -m benchmarks.gpu OUT_DIR --fake` starts."""

import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu import bootstrap
from benchmarks.gpu.__main__ import NO_FAKE
from benchmarks.gpu.context import Context


def main(out: str) -> int:
    """Run the checks. Return 0 if all held, 1 if not, 4 on a torch that has no CUDA tensors at all."""
    if torch.version.cuda is None:
        print(
            f"torch {torch.__version__} is a CPU build: it has no CUDA tensors, not even fake ones. "
            "pip install torch==2.11.0 from the ordinary index has them.",
            file=sys.stderr,
        )
        return NO_FAKE
    from benchmarks.gpu.fake import checks

    print(f"C++ module: {bootstrap.build_native(dict(os.environ))}", flush=True)
    context = Context("fake", Path(out), True, time.monotonic() + 3600, [])
    checks.run(context)
    passed = all(r.get("ok", True) and "skipped" not in r for r in context.rows)
    context.write("passed" if passed else "failed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
