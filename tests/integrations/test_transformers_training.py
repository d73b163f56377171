"""Training a patched model: Trainer, adapters, mixed precision, compilation, two ranks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from or1.integrations.heads import UnsupportedHeadError
from or1.integrations.transformers import UnsupportedModelError, patch_model, unpatch_model
from tests.helpers.tiny_models import assert_same_grads, batch, from_logits, grads, tiny


@pytest.mark.slow
def test_a_compiled_model_scores() -> None:
    model, inputs = patch_model(tiny()), batch()
    want = model(**inputs)
    out = torch.compile(model, backend="eager")(**inputs)
    torch.testing.assert_close(out.log_probs, want.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.integrations
def test_label_smoothing_in_trainer_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("accelerate")
    ids = torch.arange(3, 13)
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        label_smoothing_factor=0.1,
    )
    with caplog.at_level(logging.WARNING, "or1.integrations"):
        Trainer(patch_model(tiny().train()), args, train_dataset=[{"input_ids": ids, "labels": ids}] * 4).train()
    assert [r.name for r in caplog.records].count("or1.integrations") == 1


@pytest.mark.integrations
def test_an_adapter_around_a_patched_head_is_scored() -> None:
    """patch_model first, get_peft_model after."""
    peft = pytest.importorskip("peft")
    inputs = batch()
    model = peft.get_peft_model(
        patch_model(tiny()),
        peft.LoraConfig(r=3, task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False),
    ).eval()
    out = model(**inputs)
    want = from_logits(unpatch_model(model), inputs)
    torch.testing.assert_close(out.log_probs, want[0], rtol=1e-5, atol=2e-5)
    assert not torch.allclose(out.log_probs, patch_model(tiny())(**inputs).log_probs, atol=1e-3)


@pytest.mark.integrations
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_trains_the_same(tmp_path: Path, accumulate: int) -> None:
    """Stock SFT loss, with num_items_in_batch counting the tokens of all accumulated micro-batches."""
    pytest.importorskip("accelerate")
    generator = torch.Generator().manual_seed(4)
    rows = []
    for i in range(12):
        ids = torch.randint(3, 101, (10,), generator=generator)
        rows.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(10) < i % 7, -100)})

    def train(model: Any) -> tuple[list[float], dict[str, Tensor]]:
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=3,
            gradient_accumulation_steps=accumulate,
            max_steps=4,
            learning_rate=0.05,
            optim="sgd",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            seed=5,
        )
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train()
        logs = [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "grad_norm" in e]
        return [float(x) for pair in logs for x in pair], dict(model.named_parameters())

    want, want_parameters = train(tiny().train())
    got, parameters = train(patch_model(tiny().train()))
    assert got == pytest.approx(want, rel=1e-5) and len(got) == 8
    for name, p in parameters.items():
        torch.testing.assert_close(p, want_parameters[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(parameters["lm_head.weight"], tiny().lm_head.weight, atol=1e-3)


@pytest.mark.integrations
@pytest.mark.parametrize("kind", ["lora", "lora, dropout and bias", "modules_to_save", "backbone only"])
def test_adapters_on_the_head_are_exact(kind: str) -> None:
    peft = pytest.importorskip("peft")
    settings = {
        "lora": {"target_modules": ["lm_head", "q_proj"], "init_lora_weights": False},
        "lora, dropout and bias": {
            "target_modules": ["lm_head"],
            "init_lora_weights": False,
            "lora_dropout": 0.4,
            "lora_bias": True,
        },
        "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "backbone only": {"target_modules": ["q_proj"], "init_lora_weights": False},
    }[kind]
    base = tiny()
    base.lm_head.bias = nn.Parameter(torch.randn(101)) if settings.get("lora_bias") else None
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, task_type="CAUSAL_LM", **settings)).train()
    inputs = batch()

    def both(call: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(6)
        return call()

    if settings.get("lora_dropout"):
        # Dropout draws for all positions or for scored ones, so that only its absence can be compared.
        with torch.no_grad():
            patch_model(model)
            a, b = (both(lambda: model(**inputs).log_probs) for _ in range(2))
            assert torch.equal(a, b) and not torch.equal(a, model(**inputs).log_probs)
        unpatch_model(model).eval()
    want = from_logits(model, inputs)
    want_grads = grads(model, want[2] + want[1].sum() * 0.1)
    out = patch_model(model)(**inputs)
    torch.testing.assert_close(out.log_probs, want[0], rtol=1e-5, atol=2e-5)
    assert_same_grads(grads(model, out.loss + out.entropy.sum() * 0.1), want_grads)
    with model.disable_adapter():
        off = model(**inputs).log_probs
        torch.testing.assert_close(off, from_logits(unpatch_model(model), inputs)[0], rtol=1e-5, atol=2e-5)
    assert not torch.allclose(off, out.log_probs, atol=1e-3) or kind == "modules_to_save"


@pytest.mark.integrations
def test_what_is_not_a_matrix_product_is_refused() -> None:
    peft = pytest.importorskip("peft")
    dora = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["lm_head"], use_dora=True))
    with pytest.raises(UnsupportedHeadError, match="LoRA variant"):
        patch_model(dora)
    other = tiny()
    other.lm_head = nn.Sequential(other.lm_head)
    with pytest.raises(UnsupportedHeadError, match="the LM head is Sequential"):
        patch_model(other)
    with pytest.raises(UnsupportedModelError, match="Qwen2Model has no LM head"):
        patch_model(tiny().model)


def test_autocast_and_bf16_weights_follow_the_linear_layer() -> None:
    """bf16 products with fp32 logits: nearer to fp64 than bf16 logits are."""
    inputs = batch()
    exact = from_logits(tiny().double(), inputs)[0]
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        stock = from_logits(model, inputs)[0]
        mine = patch_model(model)(**inputs).log_probs
    assert mine.dtype == torch.float32
    error, peer = (float((x - exact).abs().mean()) for x in (mine, stock))
    assert error <= 2 * peer + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("check", ["fsdp2", "fsdp1"])
def test_two_ranks_equal_one(check: str, tmp_path: Path) -> None:
    """Forward through the wrapped model, so that FSDP's hooks gather the head's weight."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "tests.helpers.transformers_ranks", check]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "rendezvous")],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=150)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(o[-3000:] for o in outputs)
