"""Engine and trainer that share their weights and still disagree stop the run, whatever the cause."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from or1.cli import main
from or1.model.load import load_model
from or1.train.engine_check import LIMIT_KL
from tests.helpers.small_run import arguments, lines

SHORT = {"stage__0__steps": 1, "stage__1__steps": 1, "stage__0__prompts_per_step": 8, "stage__0__group_size": 8}


def noisy(model: PreTrainedModel) -> None:
    """Add the noise of dropout without a config or a module that shows it."""
    layer = model.get_decoder().layers[1].mlp
    layer.register_forward_hook(lambda m, _, x: torch.nn.functional.dropout(x, 0.1, m.training))


def unrotated(model: PreTrainedModel) -> None:
    """Other positions in the packed row than in generation."""
    whole = model.get_decoder().forward
    model.get_decoder().forward = lambda **kw: whole(
        **kw | ({"position_ids": torch.arange(kw["input_ids"].shape[1])[None]} if "cu_seq_lens_q" in kw else {})
    )


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch):
    """Give the trainer a model that something has been done to after it was checked."""

    def how(change) -> None:
        def loaded(*args: object, **kwargs: object) -> PreTrainedModel:
            model = load_model(*args, **kwargs)
            change(model)
            return model

        monkeypatch.setattr("or1.train.build.load_model", loaded)

    return how


@pytest.mark.parametrize(("change", "dtype"), [(noisy, "float32"), (unrotated, "float32"), (unrotated, "bfloat16")])
def test_a_mismatch_beyond_rounding_stops_the_run(
    change, dtype: str, spoil, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(change)
    assert main(arguments(tmp_path / "run", **SHORT, model__dtype=dtype)) == 70
    said = capsys.readouterr().err
    assert "step 1: engine and trainer share their weights, but disagree" in said and "dropout" in said
    assert f"limit in {dtype}" in said and "Traceback" not in said
    assert not [line for line in lines(tmp_path / "run") if line["step"] > 0]


def test_a_mismatch_that_is_weighed_does_not(spoil, tmp_path: Path) -> None:
    spoil(noisy)
    assert main(arguments(tmp_path / "run", **SHORT, loss__is_cap=2)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_that_move_the_policy_within_a_step_are_no_mismatch(dtype: str, tmp_path: Path) -> None:
    settings = {"optim__lr": 0.01, "optim__warmup_steps": 0, "stage__0__minibatch_prompts": 2, "stage__0__reuse": 2}
    assert main(arguments(tmp_path / "run", **SHORT, **settings, model__dtype=dtype)) == 0
    later = [line["mismatch/kl"] for line in lines(tmp_path / "run") if line["step"] == 1]
    # The policy has moved since, but it is compared with the one that sampled.
    assert later[0] < LIMIT_KL[dtype]
