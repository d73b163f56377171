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
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.models import cohere, gemma2, granite, llama, qwen2, qwen3_moe

from or1.integrations.heads import UnsupportedHeadError
from or1.integrations.transformers import ScoredOutput, UnsupportedModelError, patch_model, unpatch_model

SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
}
CONFIGS = {
    "qwen2": qwen2.Qwen2Config(**SMALL),
    "llama, tied": llama.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gemma2, softcap": gemma2.Gemma2Config(**SMALL, final_logit_softcapping=3.0, query_pre_attn_scalar=16),
    "cohere, logit_scale": cohere.CohereConfig(**SMALL, logit_scale=0.25),
    "granite, logits_scaling": granite.GraniteConfig(**SMALL, logits_scaling=3.0),
    "qwen3 moe, router loss": qwen3_moe.Qwen3MoeConfig(
        **SMALL,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    ),
}


def tiny(name: str = "qwen2") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 101, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 5:8] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def from_logits(model: nn.Module, inputs: dict[str, Tensor], temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, entropy, loss) as anyone would compute them."""
    out = model(**inputs)
    labels = inputs["labels"][:, 1:]
    table = (out.logits[:, :-1].float() / temperature).log_softmax(-1)
    scored = labels != -100
    logp = table.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * scored
    return logp, -(table.exp() * table).sum(-1) * scored, out.loss


def grads(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_grads(got: dict[str, Tensor], want: dict[str, Tensor], rel: float = 1e-4) -> None:
    assert got.keys() == want.keys() and want
    scale = max(float(g.norm()) for g in want.values())
    for name, grad in want.items():
        assert float((got[name] - grad).norm()) <= rel * float(grad.norm()) + 1e-7 * scale, name


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
    script = Path(__file__).with_name("ranks.py")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(script), check]
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
