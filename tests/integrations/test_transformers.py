"""A patched model equals its own logits, in a loop and in Trainer; needs transformers only, PEFT where it says so."""

from __future__ import annotations

import copy
import io
import logging
import os
import re
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from or1.integrations.heads import UnsupportedHeadError
from or1.integrations.transformers import ScoredOutput, patch_model, unpatch_model
from tests.helpers.tiny_models import CONFIGS, SMALL, assert_same_grads, batch, from_logits, grads, tiny


@pytest.mark.parametrize("name", CONFIGS)
def test_labels_give_what_the_logits_give(name: str) -> None:
    """Log-probs, entropy, loss and every gradient; without labels the model is what it was."""
    model, inputs = tiny(name), batch()
    logp, entropy, loss = from_logits(model, inputs)
    want = grads(model, loss + (logp * 0.3 + entropy * 0.2).sum())
    logits = model(inputs["input_ids"]).logits
    out = patch_model(model)(**inputs)
    assert isinstance(out, ScoredOutput) and "logits" not in out
    torch.testing.assert_close(out.log_probs, logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, entropy, rtol=1e-5, atol=1e-5)
    assert float(out.loss) == pytest.approx(float(loss), rel=1e-5)
    assert_same_grads(grads(model, out.loss + (out.log_probs * 0.3 + out.entropy * 0.2).sum()), want)
    assert torch.equal(model(inputs["input_ids"]).logits, logits)
    assert torch.equal(unpatch_model(model)(**inputs).logits, from_logits_raw(model, inputs))


def from_logits_raw(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return type(model).forward(model, **inputs).logits


def test_temperature_shift_labels_and_copies() -> None:
    model, inputs = tiny(), batch()
    want = from_logits(model, inputs, temperature=0.5)
    patched = copy.deepcopy(patch_model(model, temperature=0.5, impl="torch"))
    torch.testing.assert_close(patched(**inputs).log_probs, want[0], rtol=1e-5, atol=1e-5)
    shifted = nn.functional.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:]
    out = patched(**inputs, shift_labels=shifted)
    torch.testing.assert_close(out.entropy[:, :-1], want[1], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        patched.lm_head.weight.zero_()
    # The copy is its own: a closure over the original would have kept scoring with the old weight.
    assert not torch.allclose(patched(**inputs, shift_labels=shifted).log_probs, out.log_probs)
    torch.testing.assert_close(model(**batch()).log_probs, want[0], rtol=1e-5, atol=1e-5)


def test_no_scored_token_is_a_loss_of_zero_with_gradients() -> None:
    model, inputs = patch_model(tiny()), batch()
    out = model(inputs["input_ids"], labels=torch.full_like(inputs["input_ids"], -100))
    found = grads(model, out.loss + out.entropy.sum())
    assert float(out.loss) == 0 and "lm_head.weight" in found and not any(bool(g.any()) for g in found.values())


def test_generation_is_untouched() -> None:
    model, inputs = tiny(), batch()
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(inputs["input_ids"], **arguments)
    assert torch.equal(patch_model(model).generate(inputs["input_ids"], **arguments), want)


def test_ignore_index_is_obeyed() -> None:
    """A collator that marks padding with 0 trains the same tokens as with transformers' own loss."""
    model, inputs = tiny(), batch()
    labels = inputs.pop("labels")
    want = model(**inputs, labels=labels).loss
    zeros = labels.masked_fill(labels == -100, 0)
    stock = model(**inputs, labels=zeros, ignore_index=0).loss
    out = patch_model(model)(**inputs, labels=zeros, ignore_index=0)
    assert float(out.loss) == pytest.approx(float(stock), rel=1e-5) == pytest.approx(float(want), rel=1e-5)
    assert torch.equal(out.label_mask, labels[:, 1:] != -100)


def test_a_resized_head_is_scored() -> None:
    model, inputs = patch_model(tiny()), batch()
    model.resize_token_embeddings(120, mean_resizing=False)
    inputs["input_ids"][2, 3] = inputs["labels"][2, 3] = 119
    out = model(**inputs)
    logp, entropy, loss = from_logits(unpatch_model(model), inputs)
    torch.testing.assert_close(out.log_probs, logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, entropy, rtol=1e-5, atol=1e-5)
    assert float(out.loss) == pytest.approx(float(loss), rel=1e-5)


def test_a_head_that_was_replaced_by_another_kind_is_named() -> None:
    model = patch_model(tiny())
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedHeadError, match="the LM head is Sequential"):
        model(**batch())


@pytest.mark.parametrize("name", ["qwen2", "llama, tied"])
def test_a_patched_model_survives_saving(name: str) -> None:
    model, inputs = patch_model(tiny(name), temperature=0.5), batch()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    want, out = model(**inputs), loaded(**inputs)
    assert torch.equal(out.log_probs, want.log_probs) and torch.equal(out.loss, want.loss)
    with torch.no_grad():
        loaded.lm_head.weight.mul_(2)
    # The loaded model is its own: another weight there, the old one here.
    assert not torch.equal(loaded(**inputs).log_probs, out.log_probs)
    assert torch.equal(model(**inputs).log_probs, want.log_probs)
    assert "logits" in unpatch_model(loaded)(**inputs) and isinstance(model(**inputs), ScoredOutput)
    assert "forward" not in vars(loaded) and "forward" not in vars(loaded.lm_head)


def test_what_is_asked_of_the_backbone_is_returned() -> None:
    model, inputs = tiny(), batch()
    want = model(**inputs, output_hidden_states=True)
    out = patch_model(model)(**inputs, output_hidden_states=True)
    assert len(out.hidden_states) == len(want.hidden_states) == 3
    for got, stock in zip(out.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(got, stock)
    assert model(**inputs).hidden_states is None
    first, *others = model(**inputs, return_dict=False)
    assert torch.equal(first, out.loss) and torch.equal(others[0], out.log_probs) and len(others) == 3
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple) and isinstance(model(**inputs, return_dict=True), ScoredOutput)


def test_accelerate_may_make_a_method_of_the_forward_again() -> None:
    """What accelerate does when it takes its wrapper for mixed precision away."""
    model, inputs = patch_model(tiny()), batch()
    want = model(**inputs)
    model.forward = types.MethodType(model.forward, model)
    assert torch.equal(model(**inputs).log_probs, want.log_probs)


@pytest.mark.parametrize(
    ("options", "kind", "word"),
    [
        ({"stash_byte": 1}, TypeError, "'stash_byte' is not an option of the head; did you mean 'stash_bytes'?"),
        ({"impl": "cuda"}, ValueError, "impl is 'cuda'; it must be one of"),
        ({"stash_bytes": "1"}, TypeError, "stash_bytes is '1', a str"),
        ({"temperature": 0}, ValueError, "temperature is 0;"),
        ({"bias": torch.zeros(101)}, ValueError, "bias cannot be set"),
        ({"grad_row_eps": 0.1}, ValueError, "grad_row_eps cannot be set"),
    ],
)
def test_a_wrong_option_raises_when_it_is_given(options: dict[str, Any], kind: type[Exception], word: str) -> None:
    model = tiny()
    with pytest.raises(kind, match=re.escape(word)):
        patch_model(model, **options)
    assert "logits" in model(**batch())


def test_one_line_says_that_or1_is_at_work(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "or1.integrations"):
        patch_model(tiny(), impl="torch")
    assert [record.getMessage() for record in caplog.records] == [
        "or1: Qwen2ForCausalLM scores its labels with or1's fused LM head, without logits (impl torch, vocabulary "
        "101, temperature 1.0)"
    ]


@pytest.mark.slow
def test_the_line_shows_in_a_program_without_logging() -> None:
    code = (
        "from transformers.models import qwen2\n"
        "from or1.integrations.transformers import patch_model\n"
        f"patch_model(qwen2.Qwen2ForCausalLM(qwen2.Qwen2Config(**{SMALL})))\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("scores its labels with or1's fused LM head") == 1, done.stderr


def test_training_past_the_head_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Trainer's label smoothing takes the labels out of the batch and computes its loss from logits."""
    model, inputs = patch_model(tiny().train()), batch()
    del inputs["labels"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "or1.integrations"):
        model.generate(inputs["input_ids"], max_new_tokens=2, pad_token_id=0)
        assert not caplog.records
        for _ in range(2):
            model(**inputs).logits.sum().backward()
    assert len(caplog.records) == 1 and "label_smoothing_factor" in caplog.records[0].getMessage()
