"""Types of the extension module that setup.py builds from csrc/; csrc/bindings.cpp documents each function."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]: ...
def plan_ranks(
    lengths: Sequence[int], capacity: int, ranks: int, linear: float, quadratic: float
) -> list[list[list[int]]]: ...
def row_sums(
    logits: NDArray[np.float32],
    targets: NDArray[np.int64],
    inv_tau: NDArray[np.float32],
    scale: float,
    softcap: float,
    threads: int,
    isa: str = "",
) -> NDArray[np.float32]: ...
def row_grads(
    logits: NDArray[np.float32],
    targets: NDArray[np.int64],
    inv_tau: NDArray[np.float32],
    scale: float,
    softcap: float,
    stats: NDArray[np.float32],
    slopes: NDArray[np.float32],
    threads: int,
    isa: str = "",
    bf16: bool = False,
) -> None: ...
def row_isas() -> list[str]: ...
