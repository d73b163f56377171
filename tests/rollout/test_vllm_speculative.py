"""Drafts, flat log-probs and rounded engines in the real vLLM: what is sampled, and with which numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from prometheus_client import generate_latest
from vllm import SamplingParams
from vllm.utils import cpu_triton_utils

from or1.core.errors import EngineError
from or1.core.types import Prompt
from or1.rollout.vllm import interface
from or1.rollout.vllm.drafts import DraftCounts, counts_of, counts_on
from or1.train.engine_check import LIMIT_ROUNDED, compare_engine

from .conftest import Side, prompts_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

NGRAM = {"method": "ngram", "tokens": 3, "ngram_min": 1, "ngram_max": 3}


def expanded(output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS=None) -> None:
    """Do what vLLM's kernel of the same name documents."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    kept = torch.where(input_val == replace_from, torch.full_like(input_val, replace_to), input_val)
    output.copy_(kept.repeat_interleave(counts))


@pytest.fixture(scope="module")
def side(start: Callable[..., Side], checkpoint: Callable[..., Path]) -> Iterator[Side]:
    # vLLM 0.32's own function leaves its output as it was: see the test of the refusal.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_triton_utils, "_expand_kernel_impl", expanded)
        made = start(checkpoint(True), engine="vllm", batch_size=256, vllm={"speculative": NGRAM})
    # vLLM's next engine in this process asks every object of every module for its __dict__; this one, of numba's
    # compiler, answers with a function.
    sys.modules.pop("llvmlite.binding.ffi", None)
    yield made
    made.engine.close()


def test_a_build_that_would_sample_another_distribution_is_refused(
    start: Callable[..., Side], checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(EngineError, match="uninitialised memory on a CPU"):
        start(checkpoint(True), engine="vllm", vllm={"speculative": NGRAM})


def test_log_probs_with_drafts_are_the_models(side: Side) -> None:
    prompts = prompts_of(4, length=40)
    side.engine.take_drafts()
    for temperature in (1.0, 0.7):
        assert side.drift(prompts, side.generate(prompts, temperature=temperature), temperature) < 1e-4
    side.disturb(1)
    side.engine.update_weights(side.engine.version + 1)
    assert side.drift(prompts, side.generate(prompts)) < 1e-4
    counts = side.engine.take_drafts()
    assert 0 < counts.accepted < counts.tokens <= 3 * counts.drafts
    assert set(counts.metrics()) == {"rollout/draft_accepted", "rollout/draft_len"}
    assert side.engine.take_drafts() == DraftCounts()


def test_a_response_with_drafts_is_a_function_of_its_seed(side: Side) -> None:
    prompts = prompts_of(4, length=40)
    many, again, alone = side.generate(prompts), side.generate(prompts), side.generate(prompts[:1])
    ids = [[f.response.token_ids.tolist() for f in found] for found in (many, again, alone)]
    assert ids[0] == ids[1] and ids[2] == ids[0][: len(ids[2])]


def test_drafts_change_no_distribution(side: Side) -> None:
    # The prompt ends in what the model likes to write, so that it accepts some of the drafts copied from there.
    begun = prompts_of(1, length=20, seed=3)[0]
    written = side.generate([begun], samples=1, temperature=0, max_tokens=40)[0].response.token_ids
    prompt = replace(begun, token_ids=np.concatenate([begun.token_ids, written]))
    side.engine.take_drafts()
    found = side.generate([prompt], samples=4000, max_tokens=3, temperature=0.7)
    counts = side.engine.take_drafts()
    print(f"accepted {counts.accepted:.0f} of {counts.tokens:.0f} drafted tokens")
    assert counts.drafts > 2000 and 200 < counts.accepted < 0.95 * counts.tokens
    texts = [tuple(f.response.token_ids[:2].tolist()) for f in found]
    right, wrong = (chi_square(texts, pair_probabilities(side, prompt, t)) for t in (0.7, 1.0))
    print(f"chi-square: {right:.1f} deviations, at another temperature {wrong:.1f}")
    assert right < 5
    assert wrong > 10, "an error must show"


def pair_probabilities(side: Side, prompt: Prompt, temperature: float) -> np.ndarray:
    """Return exact probabilities of the first two tokens, [V, V]. Column 0 follows an end of sequence."""
    with torch.no_grad():
        ids = torch.tensor(prompt.token_ids, dtype=torch.long)
        size = side.model.config.vocab_size
        rows = torch.cat([ids.expand(size, -1), torch.arange(size)[:, None]], dim=1)
        logits = side.model(rows).logits[:, -2:].double() / temperature
    first, second = logits[0, 0].softmax(-1), logits[:, 1].softmax(-1)
    second[side.tokenizer.eos_token_id] = torch.eye(size, dtype=torch.float64)[0]
    return (first[:, None] * second).numpy()


def chi_square(texts: list[tuple[int, ...]], exact: np.ndarray) -> float:
    """Return Pearson's statistic in standard deviations above its mean; rare pairs are pooled."""
    seen = np.zeros_like(exact)
    for text in texts:
        seen[text[0], text[1] if len(text) > 1 else 0] += 1
    expected = exact * len(texts)
    common = expected >= 10
    cells = [(seen[common], expected[common]), (seen[~common].sum(), expected[~common].sum())]
    total = sum(float(((s - e) ** 2 / np.maximum(e, 1e-9)).sum()) for s, e in cells)
    freedom = int(common.sum())
    return (total - freedom) / (2 * freedom) ** 0.5


def test_flat_log_probs_are_those_of_the_objects(side: Side) -> None:
    prompts = [{"prompt_token_ids": p.token_ids.tolist()} for p in prompts_of(4)]
    found = []
    for flat in (True, False):
        params = [SamplingParams(max_tokens=24, seed=i, logprobs=0, flat_logprobs=flat) for i in range(4)]
        outputs = side.engine._llm.generate(prompts, params, use_tqdm=False)
        found.append([(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs])
    for (flat_ids, flat), (ids, listed) in zip(*found, strict=True):
        assert flat_ids == ids == flat.token_ids
        assert flat.logprobs == [entry[token].logprob for token, entry in zip(ids, listed, strict=True)]


def test_a_servers_page_holds_the_same_counts(side: Side) -> None:
    side.generate(prompts_of(2, length=40))
    counts = counts_of(side.engine._llm.get_metrics())
    assert counts.drafts > 0 and counts_on(generate_latest().decode()) == counts


def test_an_unknown_argument_is_named_with_the_nearest(
    start: Callable[..., Side], checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(EngineError, match=r"rollout.vllm.engine.max_num_batch_tokens.*'max_num_batched_tokens'"):
        start(checkpoint(True), engine="vllm", vllm={"engine": {"max_num_batch_tokens": 4096}})


def test_the_installed_vllm_has_what_is_used() -> None:
    source = interface.source_folder()
    assert source is not None and interface.differences(source) == []


def test_a_push_reaches_a_rounded_engine(start: Callable[..., Side], checkpoint: Callable[..., Path]) -> None:
    vllm = {"quantization": "int8_per_channel_weight_only", "engine": {"max_num_batched_tokens": 4096}}
    if " avx512f" in Path("/proc/cpuinfo").read_text():
        vllm["kv_cache_dtype"] = "fp8"
    side = start(checkpoint(False), engine="vllm", vllm=vllm, dtype="bfloat16")
    assert side.engine._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == 4096
    compare = partial(compare_engine, side.engine, side.model, prompts_of(4, length=40), side.config)
    first = compare().require()
    with torch.no_grad():
        side.model.get_output_embeddings().weight *= -1.1
    assert compare().mean_abs > 2 * LIMIT_ROUNDED and not compare().agrees, "the change must show"
    side.engine.update_weights(1)
    pushed = compare().require()
    print(f"mean difference of a rounded engine: {first.mean_abs:.2g}, {pushed.mean_abs:.2g} after a push")
    assert first.rounded and pushed.mean_abs > 1e-4
    side.engine.close()
