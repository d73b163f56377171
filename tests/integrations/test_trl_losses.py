"""or1's objectives give the loss and the gradient that TRL's own code computes from the same batch.

One trainer of TRL holds the model; its settings change from test to test. or1's side has the trainer's plain parts:
hidden states, the fused head, Normaliser and PolicyObjective as or1 builds them from `[loss]`.
Legend: B sequences, C completion tokens, N trained tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from or1.config.loss import LossConfig
from or1.core.types import TrainSequence
from or1.magic.baselines import advantages
from or1.magic.denominator import Normaliser
from or1.magic.mismatch import weigh
from or1.train.stage import objective_of
from or1_kernels import linear_policy_loss
from tests.helpers.grpo import WORDS, even_ids, word_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.integrations,
    pytest.mark.skipif(
        "vllm_importance_sampling_clip_max" not in trl.GRPOConfig.__dataclass_fields__,
        reason=f"trl {trl.__version__} has no two-sided importance masks; 1.16 has",
    ),
]
B, C, MAX_C = 8, 9, 10


def trainer_of(cls: Any, config: Any, model: Path, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    args = config(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=B,
        num_generations=4,
        max_completion_length=MAX_C,
        gradient_checkpointing=False,
        temperature=0.9,
        disable_tqdm=True,
        log_level="error",
    )
    trainer = cls(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=even_ids,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w1 w2 w3"] * B}),
        processing_class=word_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


@pytest.fixture(scope="module")
def trainer(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trainer_of(trl.GRPOTrainer, trl.GRPOConfig, tiny_qwen2, tmp_path_factory.mktemp("trl"))


def own_logps(trainer: Any, batch: dict[str, Tensor]) -> Tensor:
    ids_BT = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask_BT = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        width = batch["completion_ids"].shape[1]
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids_BT, mask_BT, width)[0]


@pytest.fixture(scope="module")
def batch(trainer: Any) -> dict[str, Tensor]:
    """Eight completions of 2 to 9 tokens, and log-probs of an older policy and of a reference around the policy's."""
    gen = torch.Generator().manual_seed(4)
    mask_BC = (torch.arange(C) < torch.tensor([[9], [2], [5], [7], [3], [9], [4], [6]])).long()
    made = {
        "prompt_ids": torch.randint(2, WORDS, (B, 3), generator=gen),
        "prompt_mask": torch.ones(B, 3, dtype=torch.int64),
        "completion_ids": torch.randint(2, WORDS, (B, C), generator=gen) * mask_BC,
        "completion_mask": mask_BC,
        "advantages": torch.randn(B, generator=gen),
        "num_items_in_batch": mask_BC.sum(),
    }
    logp_BC = own_logps(trainer, made)
    noise_2BC = torch.randn(2, B, C, generator=gen)
    made["old_per_token_logps"] = logp_BC + 0.3 * noise_2BC[0]
    made["ref_per_token_logps"] = logp_BC + 0.5 * noise_2BC[1]
    return made


def gradient(trainer: Any, loss: Tensor) -> tuple[float, Tensor]:
    trainer.model.zero_grad()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).clone()


def ours(trainer: Any, batch: dict[str, Tensor], loss: LossConfig) -> tuple[float, Tensor]:
    """Return loss and gradient of or1's objective. Old log-probs are in the batch unless it is on-policy."""
    model, mask_BC = trainer.model, batch["completion_mask"].bool()
    ids_BT = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attend_BT = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    hidden_BTH = model.get_decoder()(input_ids=ids_BT, attention_mask=attend_BT, use_cache=False).last_hidden_state
    hidden_NH = hidden_BTH[:, -mask_BC.shape[1] - 1 : -1][mask_BC]
    lengths_B = mask_BC.sum(1)

    def tokens(name: str) -> Tensor | None:
        return batch[name][mask_BC] if name in batch else None

    weights_B = torch.ones(B)
    if loss.mismatch.by_sequence:
        weights_B = torch.tensor([s.weight for s in weigh(sequences_of(batch), loss.mismatch)])
    normaliser = Normaliser(loss.normaliser, MAX_C)
    denominator = sum(normaliser.units(int(n)) for n in lengths_B)
    total, _ = linear_policy_loss(
        hidden_NH,
        model.lm_head.weight,
        batch["completion_ids"][mask_BC],
        (batch["advantages"] * weights_B).repeat_interleave(lengths_B).float(),
        token_weight=normaliser.weights(lengths_B.repeat_interleave(lengths_B).float()) / denominator,
        old_logp=tokens("old_per_token_logps"),
        rollout_logp=tokens("sampling_per_token_logps"),
        ref_logp=tokens("ref_per_token_logps"),
        sequences=torch.arange(B).repeat_interleave(lengths_B),
        objective=objective_of(loss),
        temperature=trainer.temperature,
    )
    return gradient(trainer, total)


def sequences_of(batch: dict[str, Tensor]) -> list[TrainSequence]:
    made = []
    for b in range(B):
        keep = batch["completion_mask"][b].bool()
        logps = (batch[name][b][keep].numpy() for name in ("sampling_per_token_logps", "old_per_token_logps"))
        rollout, old = logps
        ids = batch["completion_ids"][b][keep].numpy()
        made.append(TrainSequence(ids, ids, rollout, float(batch["advantages"][b]), old))
    return made


def assert_equal(got: tuple[float, Tensor], want: tuple[float, Tensor]) -> None:
    """Check losses to 1e-5 on the scale of the advantages, about 1, and gradients to 1e-5 of their norm."""
    assert got[0] == pytest.approx(want[0], rel=1e-5, abs=1e-6)
    assert want[1].norm() > 1e-3
    assert float((got[1] - want[1]).norm() / want[1].norm()) < 1e-5


CLIP = {"clip_low": 0.2, "clip_high": 0.28}
# TRL's attributes, and or1's [loss]. CISPO's epsilon_high is the bound of the ratio itself.
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({}, {"normaliser": "sequence", **CLIP}),
    "grpo, KL": ({"beta": 0.04}, {"normaliser": "sequence", "kl_coef": 0.04, **CLIP}),
    "bnpo": ({"loss_type": "bnpo"}, {"normaliser": "token", **CLIP}),
    "dr_grpo": ({"loss_type": "dr_grpo", "epsilon_high": 0.2}, {"preset": "dr_grpo"}),
    "dapo": ({"loss_type": "dapo"}, {"preset": "dapo"}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.3}, {"kind": "cispo", "clip_low": 1.0, "clip_high": 0.3}),
    "gspo": (
        {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.04},
        {"preset": "gspo", "clip_low": 0.05, "clip_high": 0.04},
    ),
    "gspo, KL": (
        {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.04, "beta": 0.1},
        {"preset": "gspo", "clip_low": 0.05, "clip_high": 0.04, "kl_coef": 0.1},
    ),
}


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_trls(
    trainer: Any, batch: dict[str, Tensor], name: str, on_policy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, loss = OBJECTIVES[name]
    defaults = {"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "use_vllm": False}
    for field, value in (defaults | {"epsilon_low": 0.2, "epsilon_high": 0.28} | settings).items():
        monkeypatch.setattr(trainer, field, value)
    # or1's KL term is k3 itself. By default TRL multiplies k3 by the ratio, as DeepSeek-V3.2 does.
    monkeypatch.setattr(trainer.args, "use_bias_correction_kl", False)
    given = {name: x for name, x in batch.items() if not (on_policy and name == "old_per_token_logps")}
    want = gradient(trainer, trainer._compute_loss(trainer.model, given))
    assert_equal(ours(trainer, given, LossConfig.model_validate(loss)), want)


# TRL's mode and bounds, and or1's [loss.mismatch]. IcePop is TRL's token_mask with both bounds, MIS with one.
MASKS = {
    "token_truncate": ((None, 1.2), {"kind": "tis", "upper": 1.2}),
    "token_truncate, both": ((0.9, 1.2), {"kind": "tis", "lower": 0.9, "upper": 1.2}),
    "token_mask": ((None, 1.2), {"kind": "mis", "upper": 1.2}),
    "token_mask, both": ((0.9, 1.2), {"kind": "icepop", "lower": 0.9, "upper": 1.2}),
    "sequence_truncate": ((None, 1.5), {"kind": "sequence_tis", "upper": 1.5}),
    "sequence_truncate, both": ((0.8, 1.5), {"kind": "sequence_tis", "lower": 0.8, "upper": 1.5}),
    "sequence_mask": ((None, 1.5), {"kind": "sequence_mis", "upper": 1.5}),
    "sequence_mask, both": ((0.8, 1.5), {"kind": "sequence_mis", "lower": 0.8, "upper": 1.5}),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_correction_of_the_engine_is_trls(trainer: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose log-probs differ from the policy's by 0.2 nats: TRL scores, corrects and computes its loss."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        gen = torch.Generator().manual_seed(2)
        prompt_ids = torch.tensor(trainer.processing_class(prompts)["input_ids"])
        ids_BC = torch.randint(2, WORDS, (len(prompts), C), generator=gen)
        made = {"prompt_ids": prompt_ids, "completion_ids": ids_BC}
        made |= {f"{x}_mask": torch.ones_like(made[f"{x}_ids"]) for x in ("prompt", "completion")}
        logps_BC = own_logps(trainer, made) + 0.2 * torch.randn(ids_BC.shape, generator=gen)
        return {"prompt_ids": prompt_ids.tolist(), "completion_ids": ids_BC.tolist(), "logprobs": logps_BC.tolist()}

    (low, high), mismatch = MASKS[name]
    engine = SimpleNamespace(sync_weights=lambda: None)
    settings = {
        "loss_type": "bnpo",
        "beta": 0.0,
        "use_vllm": True,
        "rollout_func": rollout,
        "vllm_generation": engine,
        "_last_loaded_step": -1,
        "vllm_importance_sampling_mode": name.partition(",")[0],
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }
    for field, value in settings.items():
        monkeypatch.setattr(trainer, field, value, raising=False)
    made = trainer._generate_and_score_completions([{"prompt": "w1 w2 w3"}] * 4 + [{"prompt": "w7 w8 w9"}] * 4)
    weights = made["importance_sampling_ratio"]
    if "mask" in name:
        assert 0 < (weights == 0).float().mean() < 1
    want = gradient(trainer, trainer._compute_loss(trainer.model, made))
    assert_equal(ours(trainer, made, LossConfig.model_validate({"mismatch": mismatch})), want)


@pytest.mark.parametrize(("scale", "std"), [("group", True), ("none", False)])
def test_advantages_are_trls(trainer: Any, scale: str, std: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for field, value in {"scale_rewards": scale, "use_vllm": False, "beta": 0.0}.items():
        monkeypatch.setattr(trainer, field, value)
    made = trainer._generate_and_score_completions([{"prompt": "w1 w2 w3"}] * 4 + [{"prompt": "w7 w8 w9"}] * 4)
    assert_advantages(made, advantages(rewards_of(made), "group", scale_std=std, eps=1e-4))


def test_rloo_is_trls(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Advantages, and the gradient: the sum over a response's tokens, averaged over responses."""
    trainer = trainer_of(trl.RLOOTrainer, trl.RLOOConfig, tiny_qwen2, tmp_path)
    trainer.beta = 0.0
    made = trainer._generate_and_score_completions([{"prompt": "w1 w2 w3"}] * 4 + [{"prompt": "w7 w8 w9"}] * 4)
    assert_advantages(made, advantages(rewards_of(made), "rloo"))
    want = gradient(trainer, trainer._compute_loss(trainer.model, made))
    loss, grad = ours(trainer, made, LossConfig(advantage="rloo", normaliser="dr_grpo"))
    # dr_grpo divides by the length limit as well, and TRL's ratio of 1 adds the advantage itself to the value.
    assert_equal((loss * MAX_C, grad * MAX_C), (loss * MAX_C, want[1]))
    assert math.isfinite(want[0])


def rewards_of(made: dict[str, Tensor]) -> np.ndarray:
    ids = [row[keep.bool()].tolist() for row, keep in zip(made["completion_ids"], made["completion_mask"], strict=True)]
    return np.array(even_ids(ids)).reshape(2, 4)


def assert_advantages(made: dict[str, Tensor], want: np.ndarray) -> None:
    assert np.abs(want).max() > 1e-2
    np.testing.assert_allclose(made["advantages"].numpy(), want.ravel(), rtol=1e-5, atol=1e-6)
