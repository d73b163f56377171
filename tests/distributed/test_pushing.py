"""Pushes of sharded weights to the one server of two ranks: what they gather, and what happens when the server dies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from or1.config import ModelConfig
from or1.model.export import named_weights, weight_forms
from or1.model.load import load_model
from tests.helpers.push_work import broadcast_to_a_failing_server, pushed_to_a_dead_server
from tests.helpers.ranks import run_ranks


@pytest.mark.timeout(100)
def test_f15_a_push_to_a_dead_server_restarts_it_and_every_rank_continues(untied: Path, tmp_path: Path) -> None:
    ranks = run_ranks(pushed_to_a_dead_server, 2, untied, tmp_path)
    assert ranks[0]["fresh"]
    for rank in ranks:
        assert rank["moved"] and rank["held"] == {1}
        # No rank exchanges the server under the others in the middle of a rollout.
        assert "responses were open. Run the same command: training resumes" in rank["told"]
    assert ranks[0]["starts"] == 2


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_broadcast_gathers_one_weight_at_a_time_and_all_despite_failures(untied: Path, tmp_path: Path) -> None:
    main, other = run_ranks(broadcast_to_a_failing_server, 2, untied, tmp_path, timeout=140)
    assert main["fresh"] == [True, True]
    # The one before lives until the next is there, and one more while it is still being sent.
    assert main["most"] <= 3 < main["weights"]
    refused, dead = main["told"]
    assert refused.startswith("EngineError") and "refused" in refused
    assert dead.startswith("EngineError") and 'rollout.vllm.transport = "file"' in dead
    # It came through the refused push, and is not left waiting by the one that ends the run.
    assert len(other["told"]) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_forms_are_those_of_the_weights_in_their_order(untied: Path, root: Path, tied: bool) -> None:
    path = root / "examples/tiny-adder" if tied else untied
    model = load_model(ModelConfig(path=str(path), dtype="bfloat16", device="cpu"))
    assert model.config.tie_word_embeddings == tied
    forms = weight_forms(model)
    assert forms == [(name, t.dtype, t.shape) for name, t in named_weights(model)]
    assert forms[0][1] is torch.bfloat16
