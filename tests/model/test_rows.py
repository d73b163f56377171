"""Packing loses nothing, and packed documents do not see each other: the two silent leaks are held shut here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config

from or1.config import ModelConfig
from or1.core.types import TrainSequence
from or1.model import mask_check
from or1.model.attention import packed_forward
from or1.model.forward import hidden_states
from or1.model.load import load_model
from or1.model.rows import keep_known, pack_indexed
from or1_kernels import _native


def sequence(rng: np.random.Generator, prompt: int, response: int, vocab: int = 50) -> TrainSequence:
    ids = rng.integers(0, vocab, prompt + response).astype(np.int32)
    return TrainSequence(ids[:prompt], ids[prompt:], rng.normal(size=response), float(rng.normal()))


@given(lengths=st.lists(st.integers(1, 64), max_size=200), spare=st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_every_sequence_is_in_exactly_one_bin_within_capacity(lengths: list[int], spare: int) -> None:
    capacity = max(lengths, default=1) + spare
    bins = _native.pack_best_fit(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in b) for b in bins]
    assert all(0 < load <= capacity for load in loads)
    # No two bins could be merged: best fit opens a bin only when nothing open fits.
    assert all(loads[i] + loads[j] > capacity for i in range(len(loads)) for j in range(i))


@pytest.mark.parametrize("bad", [0, 9, -1])
def test_a_sequence_that_cannot_be_packed_is_named(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"sequence 1 has {bad} tokens.*1 to 8.*max_tokens_per_rank"):
        _native.pack_best_fit([3, bad], 8)


def test_rows_point_at_the_states_that_predict_their_targets() -> None:
    rng = np.random.default_rng(0)
    sequences = [sequence(rng, p, r) for p, r in ((3, 4), (1, 1), (5, 2))]
    for indices, batch in pack_indexed(sequences, 7):
        offset = row = 0
        for i in indices:
            s = sequences[i]
            whole = np.concatenate([s.prompt_ids, s.response_ids])
            assert batch.ids_T[offset : offset + s.packed_tokens].tolist() == whole[:-1].tolist()
            rows = batch.rows_N[row : row + s.trained_tokens].numpy()
            assert whole[rows - offset + 1].tolist() == s.response_ids.tolist()
            assert batch.targets_N[row : row + s.trained_tokens].tolist() == s.response_ids.tolist()
            assert batch.positions_T[offset : offset + s.packed_tokens].tolist() == list(range(s.packed_tokens))
            offset, row = offset + s.packed_tokens, row + s.trained_tokens
        assert batch.cu_seqlens[-1] == offset == len(batch.ids_T) and row == len(batch.rows_N)


def test_old_logp_is_for_all_sequences_or_none() -> None:
    rng = np.random.default_rng(0)
    first, second = sequence(rng, 2, 3), sequence(rng, 2, 2)
    mixed = [TrainSequence(first.prompt_ids, first.response_ids, first.rollout_logp, 1.0, first.rollout_logp), second]
    with pytest.raises(ValueError, match="1 of 2 sequences have old_logp"):
        list(pack_indexed(mixed, 16))


TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def build(kind: str, tmp_path: Path, **settings: str) -> PreTrainedModel:
    """Save a random model of a real architecture and load it as or1 does, in fp64."""
    from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM

    torch.manual_seed(3)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TINY)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TINY, head_dim=8)),
    }[kind]()
    model.save_pretrained(tmp_path / kind)
    return load_model(ModelConfig(path=str(tmp_path / kind), dtype="float64", device="cpu", **settings))


@pytest.mark.parametrize("checkpointing", ["none", "layer", "offload"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_packed_documents_equal_the_documents_alone(kind: str, checkpointing: str, tmp_path: Path) -> None:
    model = build(kind, tmp_path, gradient_checkpointing=checkpointing).train()
    rng = np.random.default_rng(1)
    sequences = [sequence(rng, p, r) for p, r in ((3, 9), (1, 4), (6, 2), (2, 2))]
    (indices, batch), *rest = pack_indexed(sequences, 64)
    assert not rest
    weight_TH = torch.randn(len(batch.ids_T), 32, dtype=torch.float64)

    packed_TH = hidden_states(model, batch)
    (packed_TH * weight_TH).sum().backward()
    packed_grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    offset = 0
    for i in indices:
        # The plain model on one document, with nothing of or1's around it.
        model.set_attn_implementation("sdpa")
        s = sequences[i]
        ids = torch.as_tensor(np.concatenate([s.prompt_ids, s.response_ids])[:-1].astype(np.int64))
        alone_LH = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        here = slice(offset, offset + len(ids))
        torch.testing.assert_close(packed_TH[here], alone_LH, rtol=1e-10, atol=1e-10)
        (alone_LH * weight_TH[here]).sum().backward()
        offset += len(ids)
    assert packed_grads
    for name, param in model.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(packed_grads[name], param.grad, rtol=1e-9, atol=1e-10, msg=name)


def test_boundaries_isolate_even_with_a_cache_and_a_mask(tmp_path: Path) -> None:
    """transformers alone attends across documents in both of these calls, and says nothing."""
    model = build("qwen2", tmp_path)
    ids = torch.arange(10)[None]
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    boundaries = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 6, "max_length_k": 6}
    alone = model.get_decoder()(input_ids=ids[:, 4:], use_cache=False).last_hidden_state[0]
    for leak in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones_like(ids)}):
        with packed_forward():
            ours = model.get_decoder()(input_ids=ids, position_ids=positions, **boundaries, **leak).last_hidden_state[0]
        torch.testing.assert_close(ours[4:], alone, rtol=1e-10, atol=1e-10)
        theirs = model.get_decoder()(input_ids=ids, position_ids=positions, **leak).last_hidden_state[0]
        assert (theirs[4:] - alone).abs().max() > 1e-3, (
            "this leak is gone from transformers: simplify or1.model.attention"
        )


def test_a_row_knows_from_packing_whether_every_log_prob_is_known() -> None:
    rng = np.random.default_rng(0)
    whole, holed = sequence(rng, 3, 5), sequence(rng, 3, 5)
    holed.rollout_logp[1] = np.nan
    ((_, row),) = pack_indexed([whole], 64)
    assert row.all_known and keep_known(row) is row
    ((_, row),) = pack_indexed([whole, holed], 64)
    assert not row.all_known and len(keep_known(row).rows_N) == 9


def test_the_search_for_packed_sequences_is_left_out_of_packed_rows_alone(adder: Path) -> None:
    from transformers import masking_utils

    model = load_model(ModelConfig(path=str(adder), dtype="float64", device="cpu"))
    asked: list[bool] = []
    real = mask_check._search
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_check, "_search", lambda ids: asked.append(True) or real(ids))
        ((_, row),) = pack_indexed([sequence(np.random.default_rng(0), 3, 5, vocab=19)], 64)
        hidden_states(model, row)
        assert not asked
        model(input_ids=row.ids_T[None], position_ids=row.positions_T[None], use_cache=False)
        assert asked
    assert masking_utils.find_packed_sequence_indices is mask_check._find
