"""The gradient of one update depends on the sequences alone: not on packing, order or accumulation (fp64, 1e-10)."""

# B padded rows, L padded length, V vocab

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from or1.config import Config, OptimConfig
from or1.model import load_model
from or1.optim import MasterAdamW
from or1.pack import TrainSequence
from or1.step_metrics import UpdateStats
from or1.trainer import Trainer
from or1_kernels.objective import PolicyObjective
from transformers import AutoModelForCausalLM, PreTrainedModel

TEMPERATURE, ALPHA, CLIP_LOW, CLIP_HIGH = 1.3, 0.07, 0.2, 0.28


def config_of(path: Path, max_tokens: int) -> Config:
    stage = {"steps": 1, "max_response_tokens": 32, "prompts_per_step": 4, "group_size": 4}
    return Config(
        run_dir="unused", model={"path": str(path), "dtype": "float64", "device": "cpu"}, data={"train": ["unused"]},
        rollout={"temperature": TEMPERATURE}, optim={"max_tokens_per_rank": max_tokens, "grad_clip": 1e30},
        stage=[stage],
    )  # fmt: skip


def sequences_of(seed: int, off_policy: bool) -> list[TrainSequence]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(11):
        prompt, response = (rng.integers(5, 19, n).astype(np.int32) for n in rng.integers(1, 15, 2))
        # Old log-probs on both sides of the policy's own, so that some ratios are clipped and some are not.
        old = rng.normal(-2.7, 0.4, len(response)) if off_policy else None
        made.append(TrainSequence(prompt, response, rng.normal(-2, 1, len(response)), float(rng.normal()), old))
    return made


def gradient_of_update(path: Path, sequences: list[TrainSequence], max_tokens: int) -> tuple[dict, UpdateStats]:
    """What `Trainer.update` hands to the optimizer."""
    config = config_of(path, max_tokens)
    model = load_model(config.model).train()
    seen: dict[str, torch.Tensor] = {}
    optimizer = MasterAdamW(model, OptimConfig(grad_clip=1e30))
    optimizer.adamw.register_step_pre_hook(
        lambda *_: seen.update({n: m.grad.clone() for n, m in zip(optimizer.names, optimizer.masters, strict=True)})
    )
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.model, trainer.optimizer = config, model, optimizer
    trainer.objective = PolicyObjective(clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
    trainer.display = SimpleNamespace(phase=lambda *_: None)
    trainer.state = SimpleNamespace(totals=dict.fromkeys(["skipped_updates"], 0), nonfinite_in_a_row=0)
    stats = UpdateStats()
    trainer.update(sequences, ALPHA, stats)
    return seen, stats


def naive_gradient(model: PreTrainedModel, sequences: list[TrainSequence]) -> tuple[dict, float]:
    """Eq. 3.1 as written: padded rows, full logits, no packing, nothing of or1."""
    width = max(len(s.prompt_ids) + len(s.response_ids) for s in sequences)
    ids_BL = torch.zeros(len(sequences), width, dtype=torch.int64)
    attend_BL = torch.zeros_like(ids_BL)
    for b, s in enumerate(sequences):
        whole = torch.as_tensor(np.concatenate([s.prompt_ids, s.response_ids]).astype(np.int64))
        ids_BL[b, : len(whole)], attend_BL[b, : len(whole)] = whole, 1
    logits_BLV = model(ids_BL, attention_mask=attend_BL, use_cache=False).logits.double() / TEMPERATURE
    total, tokens = 0.0, sum(len(s.response_ids) for s in sequences)
    for b, s in enumerate(sequences):
        first = len(s.prompt_ids)
        for t, token in enumerate(s.response_ids.tolist()):
            log_p_V = logits_BLV[b, first + t - 1].log_softmax(-1)
            entropy = -(log_p_V.exp() * log_p_V).sum()
            old = log_p_V[token].detach() if s.old_logp is None else torch.tensor(s.old_logp[t])
            ratio = (log_p_V[token] - old).exp()
            clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
            total = total - torch.minimum(ratio * s.advantage, clipped * s.advantage) - ALPHA * entropy
    loss = total / tokens
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, loss.item()


@pytest.mark.parametrize("off_policy", [False, True])
def test_any_packing_gives_the_gradient_of_the_naive_loss(adder: Path, off_policy: bool) -> None:
    sequences = sequences_of(3, off_policy)
    model = AutoModelForCausalLM.from_pretrained(adder, dtype=torch.float64, attn_implementation="sdpa").train()
    expected, expected_loss = naive_gradient(model, sequences)
    order = np.random.default_rng(9).permutation(len(sequences))
    longest = max(s.packed_tokens for s in sequences)
    for max_tokens, given in ((longest, sequences), (64, sequences), (64, [sequences[i] for i in order]), (4096, sequences)):
        found, stats = gradient_of_update(adder, given, max_tokens)
        assert stats.losses[0] == pytest.approx(expected_loss, rel=1e-10, abs=1e-12)
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-10 * scale, msg=name)
    if off_policy:
        clip_frac = stats.metrics()["policy/clip_frac"]
        assert 0.05 < clip_frac < 0.95, "the test must see both sides of the clip"


def test_a_non_finite_update_is_counted_and_then_stops_the_run(adder: Path) -> None:
    from or1.run_state import RunError

    bad = sequences_of(1, False)[:2]
    bad[1] = TrainSequence(bad[1].prompt_ids, bad[1].response_ids, bad[1].rollout_logp, float("nan"))
    config = config_of(adder, 64)
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.model = config, load_model(config.model).train()
    trainer.optimizer = MasterAdamW(trainer.model, config.optim)
    trainer.objective, trainer.display = PolicyObjective(), SimpleNamespace(phase=lambda *_: None)
    trainer.state = SimpleNamespace(totals={"skipped_updates": 0}, nonfinite_in_a_row=0)
    before = [p.clone() for p in trainer.model.parameters()]
    for _ in range(2):
        trainer.update(bad, 0.0, UpdateStats())
    assert trainer.state.totals["skipped_updates"] == 2
    with pytest.raises(RunError, match="3 updates in a row.*max_nonfinite_steps"):
        trainer.update(bad, 0.0, UpdateStats())
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
