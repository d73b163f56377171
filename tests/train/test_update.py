"""The gradient of one update depends on the sequences alone: not on packing, order or accumulation (fp64, 1e-10)."""

# B padded rows, L padded length, V vocab

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from or1.config import Config, ModelConfig, OptimConfig
from or1.core.errors import RunError
from or1.core.types import TrainSequence
from or1.dist.oom_retry import RowBudget
from or1.magic.denominator import TOKEN_MEAN, Normaliser
from or1.model.load import load_model
from or1.model.rows import pack_rows
from or1.run.state import TrainState
from or1.train.metrics import UpdateStats
from or1.train.optim import MasterAdamW
from or1.train.rank_rows import Policy
from or1.train.score import with_old_logp
from or1.train.update import _train_row, update
from or1_kernels.objective import PolicyObjective

TEMPERATURE, ALPHA, CLIP_LOW, CLIP_HIGH, MAX_TOKENS = 1.3, 0.07, 0.2, 0.28, 40


OBJECTIVE = PolicyObjective(clip_low=CLIP_LOW, clip_high=CLIP_HIGH)


def policy_of(model: PreTrainedModel, max_tokens: int) -> Policy:
    return Policy(model, RowBudget(max_tokens), TEMPERATURE, OBJECTIVE)


def load(path: Path) -> PreTrainedModel:
    return load_model(ModelConfig(path=str(path), dtype="float64", device="cpu")).train()


def sequences_of(seed: int, off_policy: bool) -> list[TrainSequence]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(11):
        prompt, response = (rng.integers(5, 19, n).astype(np.int32) for n in rng.integers(1, 15, 2))
        # Old log-probs on both sides of the policy's own, so that some ratios are clipped and some are not.
        old = rng.normal(-2.7, 0.4, len(response)) if off_policy else None
        made.append(TrainSequence(prompt, response, rng.normal(-2, 1, len(response)), float(rng.normal()), old))
    return made


def gradient_of_update(
    path: Path,
    sequences: list[TrainSequence],
    max_tokens: int = 64,
    objective: PolicyObjective = OBJECTIVE,
    normaliser: Normaliser = TOKEN_MEAN,
) -> tuple[dict, UpdateStats]:
    """Return the gradient that `update` gives to the optimizer."""
    model, seen, stats = load(path), {}, UpdateStats()
    optimizer = MasterAdamW(model, OptimConfig(grad_clip=1e30))
    step = optimizer.step_if_finite
    optimizer.step_if_finite = lambda loss: (
        seen.update({n: g.clone() for n, g in optimizer.gradients().items()}),
        step(loss),
    )[1]
    policy = Policy(model, RowBudget(max_tokens), TEMPERATURE, objective)
    assert update(policy, optimizer, sequences, ALPHA, stats, normaliser)
    return seen, stats


def naive_gradient(
    model: PreTrainedModel,
    sequences: list[TrainSequence],
    kl_coef: float = 0.0,
    normaliser: str = "token",
    variant: str = "",
) -> tuple[dict, float]:
    """Eq. 3.1 as written: padded rows, full logits, no packing, nothing of or1. With KL and other normalisers.

    variant  "gspo": ratios of whole sequences; "icepop": a weight exp(old - rollout) in [0.5, 1.5], else 0
    """
    width = max(len(s.prompt_ids) + len(s.response_ids) for s in sequences)
    ids_BL = torch.zeros(len(sequences), width, dtype=torch.int64)
    attend_BL = torch.zeros_like(ids_BL)
    for b, s in enumerate(sequences):
        whole = torch.as_tensor(np.concatenate([s.prompt_ids, s.response_ids]).astype(np.int64))
        ids_BL[b, : len(whole)], attend_BL[b, : len(whole)] = whole, 1
    logits_BLV = model(ids_BL, attention_mask=attend_BL, use_cache=False).logits.double() / TEMPERATURE
    total = 0.0
    denominator = {
        "token": sum(len(s.response_ids) for s in sequences),
        "sequence": len(sequences),
        "dr_grpo": len(sequences) * MAX_TOKENS,
    }[normaliser]
    for b, s in enumerate(sequences):
        first = len(s.prompt_ids)
        log_p_TV = logits_BLV[b, first - 1 : first - 1 + len(s.response_ids)].log_softmax(-1)
        for t, token in enumerate(s.response_ids.tolist()):
            log_p_V = log_p_TV[t]
            entropy = -(log_p_V.exp() * log_p_V).sum()
            old = log_p_V[token].detach() if s.old_logp is None else torch.tensor(s.old_logp[t])
            ratio = (log_p_V[token] - old).exp()
            if variant == "gspo":
                own_T = log_p_TV.gather(1, torch.tensor(s.response_ids[:, None].astype(np.int64)))[:, 0]
                ratio = (own_T - torch.tensor(s.old_logp)).mean().exp()
            advantage = s.advantage
            if variant == "icepop":
                weight = np.exp(s.old_logp[t] - s.rollout_logp[t])
                advantage *= weight if 0.5 <= weight <= 1.5 else 0.0
            clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
            term = -torch.minimum(ratio * advantage, clipped * advantage) - ALPHA * entropy
            if kl_coef:
                gap = s.ref_logp[t] - log_p_V[token]
                term = term + kl_coef * (gap.exp() - gap - 1).clamp(max=10)
            total = total + term / (len(s.response_ids) if normaliser == "sequence" else 1)
    loss = total / denominator
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, loss.item()


@pytest.mark.parametrize("off_policy", [False, True])
def test_any_packing_gives_the_gradient_of_the_naive_loss(adder: Path, off_policy: bool) -> None:
    sequences = sequences_of(3, off_policy)
    model = AutoModelForCausalLM.from_pretrained(adder, dtype=torch.float64, attn_implementation="sdpa").train()
    expected, expected_loss = naive_gradient(model, sequences)
    order = np.random.default_rng(9).permutation(len(sequences))
    longest = max(s.packed_tokens for s in sequences)
    shuffled = [sequences[i] for i in order]
    for max_tokens, given in ((longest, sequences), (64, sequences), (64, shuffled), (4096, sequences)):
        found, stats = gradient_of_update(adder, given, max_tokens)
        assert stats.losses[0] == pytest.approx(expected_loss, rel=1e-10, abs=1e-12)
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-10 * scale, msg=name)
    if off_policy:
        clip_frac = stats.metrics()["policy/clip_frac"]
        assert 0.05 < clip_frac < 0.95, "the test must see both sides of the clip"


@pytest.mark.parametrize("normaliser", ["token", "sequence", "dr_grpo"])
def test_kl_and_normalisers_give_the_gradient_of_the_naive_loss(adder: Path, normaliser: str) -> None:
    rng = np.random.default_rng(2)
    sequences = [replace(s, ref_logp=s.old_logp + rng.normal(0, 0.5, len(s.old_logp))) for s in sequences_of(4, True)]
    reference = AutoModelForCausalLM.from_pretrained(adder, dtype=torch.float64, attn_implementation="sdpa").train()
    expected, expected_loss = naive_gradient(reference, sequences, 0.3, normaliser)
    objective = PolicyObjective(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, kl_coef=0.3)
    found, stats = gradient_of_update(adder, sequences, 64, objective, Normaliser(normaliser, MAX_TOKENS))
    assert stats.losses[0] == pytest.approx(expected_loss, rel=1e-10, abs=1e-12)
    for name, grad in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-10 * scale, msg=name)


@pytest.mark.parametrize(
    ("variant", "normaliser", "objective"),
    [
        ("gspo", "sequence", replace(OBJECTIVE, kind="gspo")),
        ("icepop", "token", replace(OBJECTIVE, is_cap=1.5, is_floor=0.5, is_mask=True)),
    ],
)
def test_whole_sequences_and_masks_give_the_gradient_of_the_naive_loss(
    adder: Path, variant: str, normaliser: str, objective: PolicyObjective
) -> None:
    """GSPO sums over a sequence the gradient of its ratio, here without a stop-gradient, over several packed rows."""
    sequences = [replace(s, old_logp=s.old_logp + 0.15) for s in sequences_of(6, True)]
    sequences = [replace(s, rollout_logp=s.old_logp + 0.5 * s.rollout_logp + 1) for s in sequences]
    reference = AutoModelForCausalLM.from_pretrained(adder, dtype=torch.float64, attn_implementation="sdpa").train()
    expected, expected_loss = naive_gradient(reference, sequences, normaliser=normaliser, variant=variant)
    found, stats = gradient_of_update(adder, sequences, MAX_TOKENS, objective, Normaliser(normaliser))
    metrics = stats.metrics()
    assert metrics["optim/loss"] == pytest.approx(expected_loss, rel=1e-10, abs=1e-12)
    assert 0.05 < metrics["policy/clip_frac"] < 0.95
    for name, grad in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-10 * scale, msg=name)
    if variant == "icepop":
        weights = np.exp(np.concatenate([s.old_logp - s.rollout_logp for s in sequences]))
        outside = float(np.mean((weights < 0.5) | (weights > 1.5)))
        assert metrics["mismatch/masked_tokens"] == pytest.approx(outside) and 0.05 < outside < 0.95


def test_a_sequence_that_loses_its_tokens_does_not_disturb_the_ratio_of_others(adder: Path) -> None:
    """The first sequence of a row has no known token, another only some: their ratio is that of the known ones."""
    sequences = sequences_of(3, True)[:5]
    nan = np.full(len(sequences[0].response_ids), np.nan)
    lost = [replace(sequences[0], rollout_logp=nan), *sequences[1:]]
    objective = replace(OBJECTIVE, kind="gspo")
    found, _ = gradient_of_update(adder, lost, 4096, objective)
    want, _ = gradient_of_update(adder, sequences[1:], 64, objective)
    assert all(torch.allclose(grad, want[name], rtol=1e-9, atol=1e-12) for name, grad in found.items())


def test_a_non_finite_advantage_skips_the_update_and_repeats_stop_the_run(adder: Path) -> None:
    bad = sequences_of(1, False)[:2]
    bad[1] = replace(bad[1], advantage=float("nan"))
    model = load(adder)
    optimizer = MasterAdamW(model, OptimConfig())
    before = [p.clone() for p in model.parameters()]
    stats, state = UpdateStats(), TrainState.start(Config(run_dir="r", model={"path": "m"}))
    with pytest.raises(RunError, match=r"3 updates in a row.*max_nonfinite_steps"):
        for _ in range(10):
            state.note_update(update(policy_of(model, 64), optimizer, bad, ALPHA, stats), limit=3)
    assert state.totals["skipped_updates"] == 3 and stats.metrics()["optim/skipped"] == 3
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_one_finite_update_forgives_those_skipped_before() -> None:
    state = TrainState.start(Config(run_dir="r", model={"path": "m"}))
    for took in (False, False, True, False, False):
        state.note_update(took, limit=3)
    assert state.nonfinite_in_a_row == 2 and state.totals["skipped_updates"] == 4


def test_old_logp_is_the_policys_own_and_makes_the_ratio_one(adder: Path) -> None:
    model, sequences = load(adder), sequences_of(5, False)
    filled = with_old_logp(policy_of(model, 64), sequences)
    found, stats = gradient_of_update(adder, filled)
    on_policy, _ = gradient_of_update(adder, sequences)
    assert stats.metrics()["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-12)
    for name, grad in found.items():
        torch.testing.assert_close(grad, on_policy[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", [[0], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]])
def test_f09_tokens_without_a_finite_engine_logp_leave_the_loss(adder: Path, tokens: list[int]) -> None:
    sequences = sequences_of(3, False)
    lost = sequences[2]
    logp = lost.rollout_logp.copy()
    logp[[t for t in tokens if t < len(logp)]] = np.nan
    given = [*sequences[:2], replace(lost, rollout_logp=logp), *sequences[3:]]
    found, stats = gradient_of_update(adder, given)
    trained = sum(s.trained_tokens for s in sequences) - int(np.isnan(logp).sum())
    assert stats.tokens == trained and all(np.isfinite(v) for v in stats.metrics().values())

    whole, _ = gradient_of_update(adder, sequences)
    if len(tokens) > 1:
        rest, _ = gradient_of_update(adder, [*sequences[:2], *sequences[3:]])
        assert all(torch.allclose(grad, rest[name], rtol=1e-9, atol=1e-12) for name, grad in found.items())
    assert any(not torch.allclose(grad, whole[name], rtol=1e-3) for name, grad in found.items())


@pytest.mark.parametrize(
    "objective",
    [PolicyObjective(), PolicyObjective(kl_coef=0.1), PolicyObjective(is_cap=2.0), PolicyObjective(kind="cispo")],
)
def test_f12_a_row_without_a_sequence_has_a_gradient_of_zeros(adder: Path, objective: PolicyObjective) -> None:
    model = load(adder)
    (anchor,) = pack_rows([], [[]], dtype=torch.float64)
    policy = Policy(model, RowBudget(64), TEMPERATURE, objective)
    optimizer = MasterAdamW(model, OptimConfig())
    loss, _ = _train_row(policy, optimizer, ALPHA, TOKEN_MEAN, 7.0, anchor)
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_the_heads_fp32_gradient_survives_the_row(adder: Path, tied: bool) -> None:
    """A bf16 weight: the head adds to the optimizer's fp32 sum. Tied, the embedding adds to the same sum."""
    sequences, found = sequences_of(0, off_policy=False), []
    for main_grad in (True, False):
        model = load(adder).bfloat16()
        head = model.get_output_embeddings()
        head.weight = model.get_input_embeddings().weight if tied else torch.nn.Parameter(head.weight.detach().clone())
        # Hooks take the gradients of a model, so each optimizer has its own.
        optimizer = MasterAdamW(model, OptimConfig(grad_dtype="float32"))
        assert optimizer.main_grad(head.weight) is not None
        if not main_grad:
            optimizer.zero_grad()
            optimizer.main_grad = lambda param: None  # type: ignore[method-assign]
        policy = Policy(model, RowBudget(64), TEMPERATURE, PolicyObjective())
        for row in pack_rows(sequences, [[i] for i in range(len(sequences))], dtype=torch.float32):
            _train_row(policy, optimizer, 0.01, TOKEN_MEAN, 100.0, row)
        found.append(optimizer.gradients())
        (name,) = (n for n, p in model.named_parameters() if p is head.weight)
    ours, rounded = found
    assert ours.keys() == rounded.keys()
    for name, grad in ours.items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, rounded[name], rtol=0.05, atol=0.01 * float(grad.abs().max()))
    # Not rounded to bf16 on the way.
    assert not torch.equal(ours[name], ours[name].bfloat16().float())


def test_a_weight_in_fp32_or_a_sum_in_bf16_has_no_main_grad(adder: Path) -> None:
    model = load(adder)
    weight = model.get_output_embeddings().weight
    assert MasterAdamW(model, OptimConfig(grad_dtype="float32")).main_grad(weight) is None
    model = model.bfloat16()
    weight = model.get_output_embeddings().weight
    assert MasterAdamW(model, OptimConfig(grad_dtype="bfloat16")).main_grad(weight) is None
    assert MasterAdamW(model, OptimConfig(grad_dtype="float32")).main_grad(weight) is not None
    frozen = weight.detach().clone()
    assert MasterAdamW(model, OptimConfig(grad_dtype="float32")).main_grad(frozen) is None
