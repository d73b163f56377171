"""The candidates of every group, for a case and the settings of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import get_args

from or1.config import ModelConfig
from or1.config.model import UNTUNED_TILE
from or1.tune.case import Case
from or1.tune.search import Candidate, Values

# In the order of measurement: a group is measured with what was chosen for the groups before.
GROUPS = ("threads", "gemms", "head", "chunk", "attention", "mlp")
_CHUNKS = {"cuda": (1024, 2048, 4096, 8192, 16384), "cpu": (64, 128, 256, 512, 1024, 2048)}
_TILES = {"cuda": (2048, 4096, 8192, 16384), "cpu": (512, 2048, 8192, 16384)}
# Most bytes of fp32 logits. More rows a chunk gain little, and the activations of a longer row need the memory.
_MOST_LOGITS = {"cuda": 6 << 30, "cpu": 512 << 20}
DEFAULT_TILE = UNTUNED_TILE


def names_of(setting: str) -> list[str]:
    """Return the values of a setting of `[model]` other than "auto"."""
    annotation = ModelConfig.model_fields[setting].annotation
    return [name for name in get_args(annotation) if isinstance(name, str) and name != "auto"]


def candidates(case: Case, model: ModelConfig, threads: int, group: str, chosen: Values) -> Sequence[Candidate]:
    """Return the candidates of a group; the first is what runs without a choice.

    An explicit setting is the only candidate of its group. The values chosen so far change no group.

    threads  threads of torch in this process
    """
    return _GROUPS[group](case, model, threads)


def _threads(case: Case, model: ModelConfig, threads: int) -> list[Candidate]:
    if case.device != "cpu":
        return []
    default = Candidate(f"{threads}", {})
    if "OMP_NUM_THREADS" in os.environ:
        return [default]
    fewer = sorted({n for n in (1, 2, 4, 8, 16, 32, 64, 128, threads // 2) if 0 < n < threads}, reverse=True)
    return [default, *(Candidate(f"{n}", {"threads": n}) for n in fewer)]


def _gemms(case: Case, model: ModelConfig, threads: int) -> list[Candidate]:
    if case.device != "cpu" or case.dtype != "bfloat16":
        return []
    return [Candidate("by size", {}), *(Candidate(name, {"cpu_gemms": name}) for name in ("bf16", "fp32"))]


def _head(case: Case, model: ModelConfig, threads: int) -> list[Candidate]:
    pinned_impl, pinned_preset = model.head_impl != "auto", model.head_preset != "auto"
    pinned: Values = {"head_impl": model.head_impl} if pinned_impl else {}
    pinned |= {"head_preset": model.head_preset} if pinned_preset else {}
    if model.head_chunk_rows:
        pinned["head_chunk_rows"] = model.head_chunk_rows
    found = [Candidate(f"{model.head_impl}, {model.head_preset}", pinned)]
    for name in [] if pinned_impl else names_of("head_impl"):
        # A CPU runs Triton only under its interpreter, which is for tests. QuACK is for losses without a bonus.
        fits = name not in ("triton", "quack") if case.device == "cpu" else name != "quack" or not case.entropy
        if fits:
            found.append(Candidate(name, pinned | {"head_impl": name}))
    if not pinned_preset:
        found.append(Candidate(f"{model.head_impl}, lean", pinned | {"head_preset": "lean"}))
    return found


def _chunk(case: Case, model: ModelConfig, threads: int) -> list[Candidate]:
    if model.head_chunk_rows:
        return [Candidate(f"{model.head_chunk_rows} rows", {"head_chunk_rows": model.head_chunk_rows})]
    most = _MOST_LOGITS[case.device] // (4 * case.vocab)
    sizes = [rows for rows in _CHUNKS[case.device] if rows <= min(most, case.head_tokens)]
    return [Candidate("by size", {}), *(Candidate(f"{rows} rows", {"head_chunk_rows": rows}) for rows in sizes)]


def _attention(case: Case, model: ModelConfig, threads: int) -> list[Candidate]:
    if not case.heads:
        return []
    if model.attention != "auto":
        return [Candidate(model.attention, {"attention": model.attention})]
    names = names_of("attention")
    if case.device == "cpu":
        # Every other backend needs a GPU.
        names = [name for name in names if name == "sdpa"]
    return [Candidate("auto", {}), *(Candidate(name, {"attention": name}) for name in names)]


def _mlp(case: Case, model: ModelConfig, threads: int) -> list[Candidate]:
    if not case.intermediate:
        return []
    if model.mlp_tile_tokens != "auto":
        tile = int(model.mlp_tile_tokens)
        return [Candidate(f"tiles of {tile}" if tile else "whole rows", {"mlp_tile_tokens": tile})]
    default = Candidate(f"tiles of {DEFAULT_TILE}", {})
    # None above the default, which bounds the memory.
    sizes = [tile for tile in _TILES[case.device] if tile < min(DEFAULT_TILE, case.mlp_tokens)]
    return [default, *(Candidate(f"tiles of {tile}", {"mlp_tile_tokens": tile}) for tile in sizes)]


_GROUPS: dict[str, Callable[[Case, ModelConfig, int], list[Candidate]]] = {
    "threads": _threads,
    "gemms": _gemms,
    "head": _head,
    "chunk": _chunk,
    "attention": _attention,
    "mlp": _mlp,
}
