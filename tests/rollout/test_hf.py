"""The embedded engine: exact log-probs of what it samples, cut at end-of-sequence, a function of its seed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from or1.config import ModelConfig
from or1.core.types import Prompt, TrainSequence
from or1.model.export import export_model
from or1.model.forward import hidden_states, lm_head
from or1.model.load import ModelError, load_model, load_tokenizer
from or1.model.rows import pack_indexed
from or1.rollout.engine import Finished, Sampling
from or1.rollout.hf import HfEngine, RowSampler


@pytest.fixture(scope="module")
def parts(adder: Path) -> tuple:
    model = load_model(ModelConfig(path=str(adder), dtype="float32", device="cpu"))
    return model, load_tokenizer(str(adder))


def prompts_of(tokenizer, *questions: str) -> list[Prompt]:
    encode = [np.array(tokenizer.encode(q + "=<think>"), dtype=np.int32) for q in questions]
    return [Prompt(str(i), "t", q, ids, ("0",)) for i, (q, ids) in enumerate(zip(questions, encode, strict=True))]


QUESTIONS = ("7+8", "123+9", "45+678", "1+1", "999+1")


def generate(engine: HfEngine, prompts: list[Prompt], **settings: float) -> dict[tuple[int, int], Finished]:
    sampling = Sampling(**({"temperature": 1.0, "max_tokens": 40, "samples": 6, "seed": 5} | settings))
    return {(f.prompt, f.sample): f for f in engine.generate(prompts, sampling)}


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_logp_is_that_of_the_trainer_at_the_sampling_temperature(parts: tuple, temperature: float) -> None:
    model, tokenizer = parts
    prompts = prompts_of(tokenizer, *QUESTIONS)
    found = generate(HfEngine(model, tokenizer, batch_size=7), prompts, temperature=temperature)
    assert len(found) == 30
    sequences = [
        TrainSequence(prompts[p].token_ids, f.response.token_ids, f.response.logp, 1.0) for (p, _), f in found.items()
    ]
    for _, batch in pack_indexed(sequences, 256):
        with torch.no_grad():
            hidden_NH = hidden_states(model, batch)[batch.rows_N]
            logp, _ = lm_head(model)(hidden_NH, batch.targets_N, temperature=temperature)
        torch.testing.assert_close(logp, batch.rollout_logp_N, rtol=0, atol=1e-4)


def test_responses_end_with_the_first_eos_or_at_the_limit(parts: tuple) -> None:
    model, tokenizer = parts
    found = generate(HfEngine(model, tokenizer, 64), prompts_of(tokenizer, *QUESTIONS), max_tokens=18, samples=8)
    eos = tokenizer.eos_token_id
    finishes = {f.response.finish for f in found.values()}
    assert finishes == {"stop", "length"}
    for f in found.values():
        ids = f.response.token_ids.tolist()
        assert len(f.response.logp) == len(ids) <= 18
        if f.response.finish == "stop":
            assert ids.index(eos) == len(ids) - 1
        else:
            assert eos not in ids and len(ids) == 18 and f.response.truncated


def test_the_result_depends_on_the_seed_and_not_on_what_ran_before(parts: tuple) -> None:
    model, tokenizer = parts
    engine, prompts = HfEngine(model, tokenizer, 16), prompts_of(tokenizer, *QUESTIONS)
    first = generate(engine, prompts)
    torch.randn(100)
    state = torch.random.get_rng_state()
    again, other = generate(engine, prompts), generate(engine, prompts, seed=6)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all((f.response.token_ids == again[k].response.token_ids).all() for k, f in first.items())
    assert any(f.response.text != other[k].response.text for k, f in first.items())


def test_samples_follow_the_policy_and_ignore_the_checkpoints_settings(parts: tuple) -> None:
    model, tokenizer = parts
    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=1.5, eos_token_id=1)
    try:
        engine = HfEngine(model, tokenizer, 2000)
        found = generate(engine, prompts_of(tokenizer, "123+9"), samples=2000, max_tokens=6)
    finally:
        assert model.generation_config.top_k == 1
        model.generation_config = own
    # Importance sampling identity: the mean of 1 over samples weighted by p/q is 1; here, mean of -logp is the entropy.
    first = np.array([f.response.token_ids[0] for f in found.values()])
    logp = np.array([f.response.logp[0] for f in found.values()])
    for token in np.unique(first):
        share, p = (first == token).mean(), np.exp(logp[first == token][0])
        assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / len(first)) + 1e-9
    assert len(np.unique([f.response.text for f in found.values()])) > 5


@pytest.mark.parametrize(
    ("top_p", "top_k", "left"), [(0.6, 0, {0, 1}), (1.0, 1, {0}), (0.5, 3, {0}), (1.0, 0, {0, 1, 2})]
)
def test_nucleus_and_top_k_leave_the_likeliest_tokens(top_p: float, top_k: int, left: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(400, 1)
    sampler = RowSampler(Sampling(1.0, 1, 1, seed=0, top_p=top_p, top_k=top_k), range(400))
    chosen = sampler(torch.zeros(400, 1, dtype=torch.int64), logits).argmax(-1)
    assert set(chosen.tolist()) == left
    # Of tokens that are left, the shares stay in proportion.
    kept = torch.tensor([0.5, 0.3, 0.2])[sorted(left)]
    shares = torch.stack([(chosen == token).float().mean() for token in sorted(left)])
    assert torch.allclose(shares, kept / kept.sum(), atol=0.1)


def test_greedy_ignores_the_seed_and_equals_transformers(parts: tuple, adder: Path) -> None:
    model, tokenizer = parts
    found = generate(HfEngine(model, tokenizer, 3), prompts_of(tokenizer, *QUESTIONS), temperature=0.0, samples=1)
    plain = AutoModelForCausalLM.from_pretrained(adder, dtype=torch.float32)
    for i, question in enumerate(QUESTIONS):
        ids = torch.tensor([tokenizer.encode(question + "=<think>")])
        out = plain.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
        assert found[i, 0].response.token_ids.tolist() == out.tolist()


def test_version_is_stamped(parts: tuple) -> None:
    engine = HfEngine(*parts, 8)
    engine.update_weights(17)
    assert all(f.response.version == 17 for f in generate(engine, prompts_of(parts[1], "1+1")).values())


def test_export_is_a_plain_checkpoint_with_the_same_weights(parts: tuple, tmp_path: Path) -> None:
    model, tokenizer = parts
    folder = export_model(model, tokenizer, tmp_path / "out")
    folder = export_model(model, tokenizer, folder)
    assert "or1" not in (folder / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = model.state_dict()
    assert plain.state_dict().keys() == ours.keys()
    assert all(torch.equal(t, ours[name]) for name, t in plain.state_dict().items())
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert load_tokenizer(str(folder)).encode("1+1") == tokenizer.encode("1+1")


def test_tied_embeddings_stay_tied(parts: tuple) -> None:
    model, _ = parts
    assert lm_head(model).weight is model.get_input_embeddings().weight


def test_pickled_weights_are_refused(adder: Path, tmp_path: Path) -> None:
    shutil.copy(adder / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    with pytest.raises(ModelError, match=r"no \*\.safetensors.*pickled"):
        load_model(ModelConfig(path=str(tmp_path)))
