"""TRL's GRPOTrainer with or1's head trains a pretrained model with a tied head as stock TRL does."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from tests.helpers import real_trl
from tests.helpers.grpo import relative
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.nightly, pytest.mark.integrations, pytest.mark.timeout(1800)]


def test_two_steps_have_the_loss_gradients_and_weights_of_stock(smollm2: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    sides = ("stock", "or1")
    stock, ours = (run_ranks(real_trl.train, 1, side, str(smollm2), str(tmp_path), timeout=900)[0] for side in sides)
    print(
        f"trl {trl.__version__}; losses {stock['losses']} and {ours['losses']}, norms {stock['norms']}, {ours['norms']}"
    )
    for name, found in zip(sides, (stock, ours), strict=True):
        size = [len(found["tokens"][-1]), max(map(len, found["tokens"][-1]))]
        print(
            f"{name}: loss and backward of {size[0]} x {size[1]} tokens: {found['seconds']:.2f} CPU seconds on one "
            f"thread (best of 3), memory grows by {found['peak'] / 2**20:.0f} MiB"
        )
    assert ours["tokens"] == stock["tokens"] and len(stock["losses"]) == real_trl.STEPS
    assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-4, abs=1e-6)
    assert ours["norms"] == pytest.approx(stock["norms"], rel=1e-4) and min(stock["norms"]) > 1e-3
    largest = {"gradient": 0.0, "weight": 0.0}
    with safe_open(tmp_path / "stock.safetensors", "pt") as want, safe_open(tmp_path / "or1.safetensors", "pt") as got:
        assert set(got.keys()) == set(want.keys())
        for name in want.keys():  # noqa: SIM118
            kind = name.partition(".")[0]
            largest[kind] = max(largest[kind], relative(got.get_tensor(name), want.get_tensor(name)))
    print(f"largest relative difference of a tensor: {largest}")
    assert largest["gradient"] < 1e-3 and largest["weight"] < 1e-5
