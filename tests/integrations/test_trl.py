"""TRL's GRPOTrainer with the fused head trains as it does without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from or1.integrations.trl import patch
from tests.integrations.conftest import assert_same_training

pytest.importorskip("trl")
pytestmark = pytest.mark.integrations

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
OFF_POLICY = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "num_iterations": 2, "beta": 0.04,
              "entropy_coef": 0.02}


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("accumulated", [False, True])
def test_five_steps_equal_stock(grpo_run: Callable[..., Any], loss_type: str, accumulated: bool) -> None:
    """Plain and on-policy; then with accumulation, two updates a batch (old log-probs), a reference, an entropy bonus."""
    settings = {"loss_type": loss_type} | (OFF_POLICY if accumulated else {})
    assert_same_training(grpo_run(patch, **settings), grpo_run(**settings))


FEATURES = {
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 6.0, "entropy_coef_delta": 0.01},
    "entropy bonus on the tokens of highest entropy": {"entropy_coef": 0.05, "top_entropy_quantile": 0.3},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, "num_iterations": 2},
    "two-sided clip": {"delta": 1.5, "num_iterations": 2},
    "sequence-level importance weights": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "fp32 head": {"cast_lm_head_to_fp32": True},
    "bf16 autocast": {"bf16": True},
}
