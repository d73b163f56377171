"""The decoding loop gives the samples of transformers' generate, bit for bit; a draw by blocks is a full one."""

# R rows, V vocabulary

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.architectures.cases import CASES
from benchmarks.architectures.check import write_checkpoint
from benchmarks.engine.__main__ import NoText, compare, random_model
from benchmarks.engine.former import FormerEngine, FullDraw
from or1.config import ModelConfig
from or1.core.errors import Or1Error
from or1.core.types import Prompt, Response
from or1.model.load import load_model
from or1.rollout import decode, row_bits
from or1.rollout.engine import Sampling
from or1.rollout.hf import HfEngine
from or1.rollout.row_sampler import RowSampler

SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TINY = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}


def prompts_of(*lengths: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(str(i), "made", "", rng.integers(3, 90, n).astype(np.int32), ("0",)) for i, n in enumerate(lengths)]


def both(model: torch.nn.Module, sampling: Sampling, slots: dict | None = None) -> tuple[dict, dict]:
    """Return the responses of the engine as it was, and as it is."""
    found = []
    for kind in (FormerEngine, HfEngine):
        engine = kind(model, NoText(), 64)  # type: ignore[arg-type]
        found.append({(f.prompt, f.sample): f.response for f in engine.generate(prompts_of(5, 9, 7), sampling, slots)})
    return found[0], found[1]


def assert_same(former: dict[tuple[int, int], Response], now: dict[tuple[int, int], Response]) -> None:
    assert former.keys() == now.keys()
    for slot, response in former.items():
        assert response.token_ids.tolist() == now[slot].token_ids.tolist()
        assert response.logp.tobytes() == now[slot].logp.tobytes() and response.finish == now[slot].finish


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.8, "top_k": 40}], ids=str
)
def test_samples_and_log_probs_are_those_of_generate(settings: dict, dtype: torch.dtype) -> None:
    model = random_model(dtype, **TINY)
    assert decode.can_decode(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[2] *= 4  # The end of a response, so that many end early.
    sampling = Sampling(**({"temperature": 1.0, "max_tokens": 16, "samples": 12, "seed": 5} | settings))
    former, now = both(model, sampling)
    assert_same(former, now)


def test_unfinished_responses_continue_to_their_own_limits() -> None:
    model = random_model(torch.float32, **TINY)
    sampling = Sampling(temperature=1.0, max_tokens=12, samples=4, seed=5, new_tokens=5)
    former, now = both(model, sampling)
    assert_same(former, now)
    cut = {(p, s): Response(r.token_ids[: s + 1], r.logp[: s + 1], "length", 0, "") for (p, s), r in now.items()}
    former, now = both(model, Sampling(1.0, 7, 4, 6), {slot: r for slot, r in cut.items() if slot[0] != 1})
    assert_same(former, now)
    assert all(r.token_ids[: s + 1].tolist() == cut[p, s].token_ids.tolist() for (p, s), r in now.items())


def test_the_deadline_ends_a_batch_with_the_tokens_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    model, began, ticks = random_model(torch.float32, **TINY), time.monotonic(), iter(range(1, 100))
    monkeypatch.setattr(decode, "time", SimpleNamespace(monotonic=lambda: began + 100 * next(ticks)))
    engine = HfEngine(model, NoText(), 64)  # type: ignore[arg-type]
    found = list(engine.generate(prompts_of(5), Sampling(1.0, 20, 3, 1, deadline_s=350.0)))
    assert {(f.response.finish, len(f.response.token_ids)) for f in found} == {("deadline", 4)}


@pytest.mark.parametrize("top", [{}, {"top_p": 0.9}, {"top_k": 7, "top_p": 0.7}], ids=str)
@pytest.mark.parametrize("vocab", [3, 256, 3001])
def test_the_blockwise_draw_is_the_full_one(vocab: int, top: dict) -> None:
    generator = torch.Generator().manual_seed(vocab)
    # From flat to peaked rows, with tokens whose mass rounds to 0.
    logits_RV = torch.randn(23, vocab, generator=generator) * torch.linspace(0, 30, 23)[:, None]
    sampling = Sampling(1.0, 1, 1, 0, **top)
    samplers = RowSampler(sampling, range(23)), FullDraw(sampling, range(23))
    for _ in range(4):
        (token_R, logp_R), (full_R, full_logp_R) = (sampler.sample(logits_RV, range(23)) for sampler in samplers)
        assert token_R.tolist() == full_R.tolist() and torch.equal(logp_R, full_logp_R)


def test_a_sample_depends_on_its_seed_and_not_on_its_row() -> None:
    logits_RV = torch.randn(1, 500, generator=torch.Generator().manual_seed(0)).repeat(8, 1)
    alone = RowSampler(Sampling(1.0, 1, 1, 0), range(8)).sample(logits_RV[:3], [6, 1, 4])[0]
    together = RowSampler(Sampling(1.0, 1, 1, 0), range(8)).sample(logits_RV, range(8))[0]
    assert alone.tolist() == together[[6, 1, 4]].tolist()


def test_fewer_rows_are_computed_where_that_keeps_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(torch.float32, **TINY)
    with torch.no_grad():
        model.get_output_embeddings().weight[2] *= 4
    sizes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(lambda m, a, k: sizes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    sampling = Sampling(temperature=1.0, max_tokens=40, samples=21, seed=5)
    former, _ = both(model, sampling)
    # A library without kernels that depend on the number of rows: everything is allowed.
    monkeypatch.setattr(row_bits, "same_bits", lambda candidates, *shape: frozenset(candidates))
    monkeypatch.setattr(decode, "fewer_rows", lambda model, candidates, full, tokens=1: sorted(candidates))
    sizes.clear()
    engine = HfEngine(model, NoText(), 63)  # type: ignore[arg-type]
    now = {(f.prompt, f.sample): f.response for f in engine.generate(prompts_of(5, 9, 7), sampling)}
    hook.remove()
    rows = [size[0] for size in sizes]
    assert sizes[0] == (3, 9) and rows[1] == 63 and rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] <= 32, "rows leave when they have finished"
    assert sum(f.token_ids.tolist() == now[slot].token_ids.tolist() for slot, f in former.items()) >= 61
    for slot, response in former.items():
        if response.token_ids.tolist() == now[slot].token_ids.tolist():
            np.testing.assert_allclose(response.logp, now[slot].logp, atol=1e-4)


def test_another_order_of_additions_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards_if_few(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(len(x), len(weight))
        for k in range(x.shape[1]) if len(x) >= 32 else reversed(range(x.shape[1])):
            total += x[:, k, None].float() * weight[:, k].float()
        return total.to(x.dtype)

    row_bits.same_bits.cache_clear()
    monkeypatch.setattr(nn.functional, "linear", backwards_if_few)
    for dtype in (torch.float32, torch.bfloat16):
        assert row_bits.same_bits((16, 31, 32, 64), 128, 64, 40, dtype, 0) == {32, 64}
    row_bits.same_bits.cache_clear()


def test_no_rows_are_spared_for_experts(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen3_moe")
    write_checkpoint(case, tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path), dtype="float32", device="cpu"), packs=False)
    assert decode.can_decode(model) and row_bits.fewer_rows(model, [16, 32], 64) == []


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_architecture_generates_as_before(case: object, tmp_path: Path) -> None:
    write_checkpoint(case, tmp_path)  # type: ignore[arg-type]
    try:
        model = load_model(ModelConfig(path=str(tmp_path), dtype="float32", device="cpu"), packs=False)
    except (Or1Error, ValueError) as error:
        pytest.skip(str(error)[:100])
    assert_same(*both(model, Sampling(temperature=1.0, max_tokens=12, samples=16, seed=1)))


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_benchmark_finds_equal_samples_in_half_the_time(dtype: torch.dtype) -> None:
    row = compare(random_model(dtype, num_hidden_layers=8), prompts=8, samples=16, tokens=12, rounds=1)
    assert row["same_tokens"] and row["same_bits"]
    assert row["now_cpu_s"] < 0.7 * row["former_cpu_s"]  # type: ignore[operator]
