"""TRL's GRPOTrainer with the fused head trains as it does without."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from or1.integrations.trl import UnsupportedTRLError, patch
from tests.helpers.grpo import WORDS, assert_same_training

GRPOConfig = pytest.importorskip("trl").GRPOConfig
pytestmark = pytest.mark.integrations

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
OFF_POLICY = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "num_iterations": 2, "beta": 0.04}
if "entropy_coef" in GRPOConfig.__dataclass_fields__:
    OFF_POLICY["entropy_coef"] = 0.02


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("accumulated", [False, True])
def test_five_steps_equal_stock(grpo_run: Callable[..., Any], loss_type: str, accumulated: bool) -> None:
    """Plain and on-policy; then accumulation, two updates a batch (old log-probs), a reference, an entropy bonus."""
    settings = {"loss_type": loss_type} | (OFF_POLICY if accumulated else {})
    if loss_type == "luspo":
        # As TRL recommends. With weights a token, TRL before 1.5 lets padding into its mean; or1 never scores padding.
        settings["importance_sampling_level"] = "sequence"
    try:
        stock = grpo_run(**settings)
    except ValueError as error:
        if "Unknown loss type" not in str(error):
            raise
        pytest.skip(f"this trl has no loss_type {loss_type!r}")
    assert_same_training(grpo_run(patch, **settings), stock)


FEATURES = {
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 6.0, "entropy_coef_delta": 0.01},
    "entropy bonus on the tokens of highest entropy": {"entropy_coef": 0.05, "top_entropy_quantile": 0.3},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, "num_iterations": 2},
    "two-sided clip": {"delta": 1.5, "num_iterations": 2},
    "sequence-level importance weights": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "fp32 head": {"cast_lm_head_to_fp32": True},
    "bf16 autocast": {"bf16": True},
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_equal_stock(grpo_run: Callable[..., Any], name: str) -> None:
    """What TRL refuses beside Liger's loss, and what changes the head's dtype, work as they do in stock."""
    # One step in bf16: the rounding of its update may change what the next one samples.
    rel, steps = (2e-2, 1) if name == "bf16 autocast" else (1e-5, 5)
    ours, stock = grpo_run(patch, steps=steps, **FEATURES[name]), grpo_run(steps=steps, **FEATURES[name])
    assert_same_training(ours, stock, rel)


def test_the_entropy_bonus_changes_the_gradient(grpo_run: Callable[..., Any]) -> None:
    plain, bonus = grpo_run(patch, steps=1), grpo_run(patch, steps=1, entropy_coef=0.5)
    assert abs(plain.grad_norms[0] - bonus.grad_norms[0]) > 1e-3


def test_every_pass_takes_the_fused_head(grpo_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy, old and reference passes: TRL's own function raises, and only generation asks the head for logits."""
    scored, logits = [], []

    def watch(trainer: Any) -> Any:
        for model in (patch(trainer).model, trainer.ref_model):
            model.get_output_embeddings().register_forward_hook(
                lambda head, args, kwargs, out: (scored if "score_targets" in kwargs else logits).append(out),
                with_kwargs=True,
            )
        return trainer

    class Raises:
        @staticmethod
        def apply(*_: Any) -> None:
            raise AssertionError("TRL's own head ran")

    # TRL 1.0 has no such function, and a head of logits instead, which `logits` would show.
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Raises, raising=False)
    grpo_run(watch, steps=2, **OFF_POLICY)
    # Two steps on one generation, in two micro-batches: 4 policy passes, and 2 each for old and reference.
    assert len(scored) >= 8 and all(isinstance(out, tuple) for out in scored)
    assert all(out.shape[1] == 1 for out in logits)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate"])
def test_importance_sampling_correction_equals_stock(grpo_run: Callable[..., Any], mode: str) -> None:
    """An engine whose log-probs are not the trainer's, handed over by a rollout function as vLLM's are."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(trainer.state.global_step)
        ids = torch.randint(2, WORDS, (len(prompts), 8), generator=generator)
        logps = -7 + torch.randn(ids.shape, generator=generator)
        prompt_ids = trainer.processing_class(prompts)["input_ids"]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": ids.tolist(),
            "logprobs": logps[..., None].tolist(),
            "logprob_token_ids": ids[..., None].tolist(),
        }

    def with_engine(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def prepare(trainer: Any) -> Any:
            trainer.rollout_func = rollout
            trainer.use_vllm, trainer._last_loaded_step = True, -1
            trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
            return change(trainer)

        return prepare

    settings = {"vllm_importance_sampling_mode": mode, "entropy_coef": 0.01}
    want = grpo_run(with_engine(lambda trainer: trainer), **settings)
    # Weights of an engine a nat away multiply the rounding of each log-prob, by an amount that differs between CPUs.
    assert_same_training(grpo_run(with_engine(patch), **settings), want, rel=5e-5)
    ratios = [e["sampling/importance_sampling_ratio/mean"] for e in want.trainer.state.log_history if "loss" in e]
    assert ratios and any(abs(r - 1) > 1e-3 for r in ratios)


def test_lora_equals_stock(grpo_run: Callable[..., Any]) -> None:
    """The reference is the model with its adapters off."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    settings = {"beta": 0.1, "num_iterations": 2, "peft_config": config}
    assert_same_training(grpo_run(patch, **settings), grpo_run(**settings))


def test_lora_on_the_head_trains_as_in_stock_or_is_refused_by_trl_itself(grpo_run: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")

    def run(*patches: Callable[[Any], Any]) -> Any:
        return grpo_run(*patches, peft_config=peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))

    try:
        stock = run()
    except ValueError as error:
        assert "lm_head" in str(error)
        with pytest.raises(ValueError, match="lm_head"):
            run(patch)
    else:
        assert_same_training(run(patch), stock)


def test_the_trainer_class_is_patched_when_made(grpo_run: Callable[..., Any]) -> None:
    from or1.integrations.trl import Or1GRPOTrainer

    record = grpo_run(trainer_class=Or1GRPOTrainer, steps=2)
    assert hasattr(record.trainer.model, "_or1_settings")
    assert_same_training(record, grpo_run(steps=2))


def test_other_versions_and_trainers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    with pytest.raises(UnsupportedTRLError, match="the trainer is SimpleNamespace"):
        patch(SimpleNamespace())
    for version in ("0.29.1", "1.17.0"):
        monkeypatch.setattr(trl, "__version__", version)
        with pytest.raises(UnsupportedTRLError, match=f"trl is {version}; this or1 is tested with 1"):
            patch(SimpleNamespace())


def test_the_temperature_is_the_trainers(grpo_run: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"set GRPOConfig\.temperature"):
        grpo_run(lambda trainer: patch(trainer, temperature=0.5), steps=1)


@pytest.mark.parametrize(
    ("options", "kind", "word"),
    [({"stash_byte": 1}, TypeError, "did you mean 'stash_bytes'"), ({"impl": "cuda"}, ValueError, "impl is 'cuda'")],
)
def test_a_wrong_option_raises_at_the_call(
    grpo_run: Callable[..., Any], options: dict[str, Any], kind: type[Exception], word: str
) -> None:
    def patched(trainer: Any) -> Any:
        with pytest.raises(kind, match=word):
            patch(trainer, **options)
        assert "_or1_settings" not in vars(trainer.model)
        return trainer

    grpo_run(patched, steps=1)
