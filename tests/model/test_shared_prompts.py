"""Shared prompts: the same hidden states, loss and gradients as the unshared row, in fewer tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from or1.config import ModelConfig, OptimConfig
from or1.core.types import TrainSequence
from or1.dist.oom_retry import RowBudget
from or1.model.forward import hidden_states
from or1.model.load import load_model
from or1.model.rows import pack_indexed
from or1.model.shared_prompts import make_units, saved_fraction
from or1.train.metrics import UpdateStats
from or1.train.optim import MasterAdamW
from or1.train.rank_rows import Policy
from or1.train.score import with_old_logp
from or1.train.update import update


def group_sequences(shapes: list[tuple[int, list[int]]], seed: int = 0, vocab: int = 19) -> list[TrainSequence]:
    """Return the shuffled sequences of groups of (prompt tokens, response lengths)."""
    rng = np.random.default_rng(seed)
    made = []
    for prompt_tokens, responses in shapes:
        prompt = rng.integers(5, vocab, prompt_tokens).astype(np.int32)
        for n in responses:
            ids = rng.integers(5, vocab, n).astype(np.int32)
            made.append(TrainSequence(prompt, ids, rng.normal(-2, 1, n), float(rng.normal())))
    return [made[i] for i in rng.permutation(len(made))]


def fp64_model(adder: Path, **options: str) -> PreTrainedModel:
    """Return a model that is fp64 throughout: transformers' RMSNorm computes in fp32, which hides 1e-7."""
    model = load_model(ModelConfig(path=str(adder), dtype="float64", device="cpu", **options)).train()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: (
                m.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.variance_epsilon)
            )
    return model


GROUPS = [(12, [5, 1, 9, 3]), (3, [7, 2]), (1, [1, 1, 4]), (8, [6])]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=6)), max_size=12),
    spare=st.integers(0, 80),
    sharing=st.sampled_from(["auto", "on", "off"]),
)
@settings(max_examples=100, deadline=None)
def test_every_sequence_is_in_one_unit_of_its_own_prompt(shapes: list, spare: int, sharing: str) -> None:
    sequences = group_sequences(shapes)
    limit = max((s.packed_tokens for s in sequences), default=1) + spare
    prompts, lengths = [s.prompt_ids for s in sequences], [s.trained_tokens for s in sequences]
    units = make_units(prompts, lengths, limit, sharing)
    assert sorted(i for u in units for i in u.members) == list(range(len(sequences)))
    for unit in units:
        first, *rest = (sequences[i] for i in unit.members)
        assert all(s.prompt_ids.tobytes() == first.prompt_ids.tobytes() for s in rest)
        assert unit.tokens == first.packed_tokens + sum(s.trained_tokens - 1 for s in rest) <= limit
    if sharing == "off":
        assert all(len(u.members) == 1 for u in units)
    for indices, batch in pack_indexed(sequences, limit, sharing=sharing):
        assert len(batch.ids_T) == len(batch.positions_T) == batch.cu_seqlens[-1] <= limit
        assert batch.targets_N.tolist() == [t for i in indices for t in sequences[i].response_ids]
        # The token before each target, and its position, are those of the sequence alone.
        before = [
            w for i in indices for w in np.concatenate([sequences[i].prompt_ids[-1:], sequences[i].response_ids[:-1]])
        ]
        assert batch.ids_T[batch.rows_N].tolist() == before
        places = [len(sequences[i].prompt_ids) - 1 + t for i in indices for t in range(sequences[i].trained_tokens)]
        assert batch.positions_T[batch.rows_N].tolist() == places


def test_auto_shares_where_it_saves_tokens() -> None:
    for shapes, shared in (([(12, [5, 1, 9, 3])], True), ([(2, [400, 300])], False), ([(12, [5]), (3, [7])], False)):
        sequences = group_sequences(shapes)
        ((_, batch),) = pack_indexed(sequences, 4096, sharing="auto")
        assert (batch.kv_rows_U is not None) is shared
    prompts, lengths = [s.prompt_ids for s in group_sequences([(10, [11, 11])])], [11, 11]
    assert saved_fraction(prompts, lengths) == pytest.approx(10 / 40)


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
@pytest.mark.parametrize("max_tokens", [24, 200])
def test_shared_rows_have_the_hidden_states_of_unshared_rows(max_tokens: int, checkpointing: str, adder: Path) -> None:
    model = fp64_model(adder, gradient_checkpointing=checkpointing)
    sequences, found, tokens = group_sequences(GROUPS), {}, {}
    for sharing in ("off", "on"):
        states: dict[int, torch.Tensor] = {}
        tokens[sharing] = 0
        for indices, batch in pack_indexed(sequences, max_tokens, sharing=sharing):
            parts = hidden_states(model, batch)[batch.rows_N].split([sequences[i].trained_tokens for i in indices])
            states |= dict(zip(indices, parts, strict=True))
            tokens[sharing] += len(batch.ids_T)
        all_states = torch.cat([states[i] for i in range(len(sequences))])
        torch.manual_seed(0)
        (all_states * torch.randn_like(all_states)).sum().backward()
        found[sharing] = [all_states.detach(), *(p.grad for p in model.parameters())]
        model.zero_grad()
    assert tokens["on"] < tokens["off"]
    for shared, alone in zip(found["on"], found["off"], strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-10, atol=1e-10 * alone.abs().max().item())


@pytest.mark.parametrize("recompute", [False, True])
def test_the_update_is_the_same(recompute: bool, adder: Path) -> None:
    found = {}
    for sharing in ("off", "on"):
        model = fp64_model(adder)
        policy = Policy(model, RowBudget(40), 1.1, sharing=sharing)
        sequences = group_sequences(GROUPS)
        if recompute:
            sequences = with_old_logp(policy, sequences)
        optimizer, stats, seen = MasterAdamW(model, OptimConfig(lr=1e-3)), UpdateStats(), {}
        step = optimizer.step_if_finite
        optimizer.step_if_finite = lambda loss, seen=seen, o=optimizer, step=step: (
            seen.update({n: g.clone() for n, g in o.gradients().items()}),
            step(loss),
        )[1]
        assert update(policy, optimizer, sequences, 0.05, stats)
        found[sharing] = (stats.losses[0], stats.metrics()["policy/entropy_exact"], seen)
    assert found["on"][:2] == pytest.approx(found["off"][:2], rel=1e-11)
    for name, grad in found["off"][2].items():
        torch.testing.assert_close(found["on"][2][name], grad, rtol=1e-10, atol=1e-10 * grad.abs().max().item())
