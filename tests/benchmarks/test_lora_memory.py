"""An update of adapters needs at most a third of the memory of full fine-tuning, measured on a model of 135 M."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("peft")

from benchmarks.step.lora_memory import measured, save_model

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


@pytest.mark.timeout(1500)
def test_an_update_of_adapters_needs_at_most_a_third_of_the_memory(tmp_path: Path) -> None:
    save_model(tmp_path)
    found = measured(tmp_path)
    assert found["full"] > 2000, "masters, moments and gradient sums of 135 M parameters"
    assert found["full"] >= 3 * found["adapters"], found
