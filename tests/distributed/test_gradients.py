"""One update on 1, 2 and 4 gloo ranks, rows whole or in slices: the same gradient and the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers import dist_work
from tests.helpers.ranks import run_ranks

# Sequences of an update; below 0 with old log-probs, recomputed. One sequence leaves ranks without any.
COUNTS = [13, 1, -13]
NUMBERS = (
    "optim/loss",
    "optim/grad_norm",
    "policy/entropy_exact",
    "policy/clip_frac",
    "policy/ratio_mean",
    "mismatch/kl",
)


def relative(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    assert got.keys() == want.keys()
    return {name: np.linalg.norm(got[name] - grad) / np.linalg.norm(grad) for name, grad in want.items()}


def relative_whole(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """Return the relative error of all parameters as one vector."""
    error = sum(np.square(got[name] - grad).sum() for name, grad in want.items())
    return float(np.sqrt(error / sum(np.square(grad).sum() for grad in want.values())))


@pytest.fixture(scope="module")
def alone(adder: Path) -> dict[str, list[dict]]:
    """Return the update of one process, with and without shared prompts."""
    sharings = ("off", "on")
    return {s: run_ranks(dist_work.one_update, 1, adder, "float32", 1, COUNTS, False, s)[0] for s in sharings}


@pytest.mark.parametrize(
    ("size", "sequence", "sharing"),
    [
        (2, 1, "off"),
        (2, 2, "on"),
        pytest.param(4, 1, "off", marks=pytest.mark.slow),
        pytest.param(2, 2, "off", marks=pytest.mark.slow),
        pytest.param(4, 2, "on", marks=pytest.mark.slow),
    ],
)
def test_gradients_do_not_depend_on_the_ranks(
    size: int, sequence: int, sharing: str, alone: dict[str, list[dict]], adder: Path
) -> None:
    every_rank = run_ranks(dist_work.one_update, size, adder, "float32", sequence, COUNTS, False, sharing)
    for results in every_rank:
        for want, got in zip(alone[sharing], results, strict=True):
            assert relative_whole(got["grads"], want["grads"]) < 1e-6
            # A parameter of small gradient alone: fp32 sums in another order.
            assert max(relative(got["grads"], want["grads"]).values()) < 5e-6
            for name in NUMBERS:
                assert got["metrics"][name] == pytest.approx(want["metrics"][name], rel=1e-6, abs=1e-7), name
    for results in every_rank[1:]:
        for first, other in zip(every_rank[0], results, strict=True):
            assert first["metrics"] == other["metrics"], "all ranks must see the same bits"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("bfloat16", 3e-2)])
def test_a_head_of_its_own_other_types_and_recomputed_activations(dtype: str, bound: float, untied: Path) -> None:
    want = run_ranks(dist_work.one_update, 1, untied, dtype, 1, [13])[0]
    for results in run_ranks(dist_work.one_update, 4, untied, dtype, 2, [13], True):
        assert max(relative(results[0]["grads"], want[0]["grads"]).values()) < bound
        # bf16 weights are kept as fp32 shards, so a step moves them by less than bf16 could show.
        assert relative(results[0]["weights"], want[0]["weights"])["lm_head.weight"] < bound


@pytest.mark.slow
def test_ranks_train_alike_however_much_each_has_generated(untied: Path, adder: Path) -> None:
    want = run_ranks(dist_work.one_update, 1, untied, "float32", 1, [13])[0]
    for grads in run_ranks(dist_work.update_after_generation, 2, untied, adder):
        assert relative_whole(grads, want[0]["grads"]) < 1e-6


def test_heads_that_do_not_divide_are_an_error_that_says_so(adder: Path) -> None:
    with pytest.raises(AssertionError, match=r"sequence_parallel = 4 does not divide the model's 2 key-value heads"):
        run_ranks(dist_work.one_update, 4, adder, "float32", 4, COUNTS)


def test_ranks_that_do_not_divide_are_an_error_that_says_so(adder: Path) -> None:
    with pytest.raises(AssertionError, match=r"sequence_parallel = 3 does not divide the 2 ranks"):
        run_ranks(dist_work.one_update, 2, adder, "float32", 3, COUNTS)
