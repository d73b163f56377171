"""Memory of this process."""

from __future__ import annotations

import resource
import sys


def peak_memory_gib() -> float:
    """Return the largest memory held so far: allocated GPU memory if there is a GPU, else the resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
