"""Real candidates at small shapes are right, and candidates that lie about a result or a gradient are found out."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from or1.config import ModelConfig
from or1.model import attention
from or1.tune import attention_bench, head_bench, mlp_bench
from or1.tune.attention_bench import AttentionBench
from or1.tune.bench import using
from or1.tune.benches import benches
from or1.tune.case import Case, documents
from or1.tune.head_bench import HeadBench
from or1.tune.mlp_bench import MlpBench
from or1.tune.options import GROUPS, candidates
from or1_kernels.engine import gemms
from or1_kernels.engine.preference import cpu_gemms, prefer_cpu_gemms
from or1_kernels.options import HeadOptions
from or1_kernels.rows import IMPLS

DTYPES = ("float32", "bfloat16", "float64")
LOSS = head_bench.linear_policy_loss


def case(dtype: str = "float32", **changes: Any) -> Case:
    shapes = {"hidden": 48, "vocab": 1013, "intermediate": 72, "heads": 4, "kv_heads": 2, "head_dim": 16}
    tokens = dict.fromkeys(("tokens", "head_tokens", "attention_tokens", "mlp_tokens"), 777)
    rest = {"document": 150, "checkpointed": False, "entropy": True, "objective": "ppo_clip", "temperature": 1.1}
    return Case(device="cpu", dtype=dtype, **(shapes | tokens | rest | changes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head_impl": "torch", "head_chunk_rows": 50},
        {"head_impl": "native", "head_chunk_rows": 500},
        {"head_preset": "lean", "threads": 1},
        {"cpu_gemms": "bf16"},
        {"cpu_gemms": "fp32"},
    ],
)
def test_every_head_is_right(dtype: str, options: dict) -> None:
    if dtype == "float64" and options.get("head_impl") == "native":
        with pytest.raises(RuntimeError, match="computes in fp32"):
            HeadBench(case(dtype)).check(options)
        return
    assert HeadBench(case(dtype)).check(options) <= 2


@pytest.mark.parametrize(
    "changes", [{"entropy": False}, {"softcap": 5.0, "logit_scale": 0.7}, {"objective": "cispo"}, {"head_tokens": 5}]
)
def test_the_head_of_every_kind_of_model_is_checked(changes: dict) -> None:
    assert HeadBench(case(**changes)).check({}) <= 2


def lie(how: str) -> Callable[..., Any]:
    def loss_of(hidden: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if how == "gradient of the weight":
            weight.register_hook(lambda grad: grad * 1.01)
        if how == "gradient of the hidden states":
            hidden.register_hook(lambda grad: grad.roll(1, 0))
        if how == "gradient elsewhere":
            hidden.register_hook(lambda grad: grad + 1e-9)
        loss, stats = LOSS(hidden, weight, *rest, **options)
        logp = stats.logp * (1.001 if how == "log-prob" else 1)
        entropy = stats.entropy + (float("nan") if how == "entropy" else 0)
        return loss, SimpleNamespace(logp=logp[:-1] if how == "shape" else logp, entropy=entropy)

    return loss_of


@pytest.mark.parametrize(
    "how", ["gradient of the weight", "gradient of the hidden states", "gradient elsewhere", "log-prob", "entropy"]
)
def test_a_head_that_lies_is_found_out(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_bench, "linear_policy_loss", lie(how))
    assert HeadBench(case()).check({}) > 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_attention_is_right(dtype: str) -> None:
    # torch's own SDPA in fp32 is at times a little further from fp64 than the plain formula.
    assert AttentionBench(case(dtype)).check({"attention": "sdpa"}) <= (2 if dtype != "float32" else 4)


@pytest.mark.parametrize("how", ["documents leak", "not causal", "gradient", "raises"])
def test_an_attention_that_lies_is_found_out(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = attention.register("sdpa")

    def false(module: nn.Module, q: Any, k: Any, v: Any, mask: None, scaling: float, **layout: Any) -> tuple:
        if how == "gradient":
            k.register_hook(lambda grad: grad * 1.02)
            return AttentionInterface()[true](module, q, k, v, mask, scaling=scaling, **layout)
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=how != "not causal", scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("or1_test_false", false)
    monkeypatch.setattr(attention, "register", lambda backend: "or1_test_false")
    bench = AttentionBench(case())
    if how != "raises":
        assert bench.check({"attention": "sdpa"}) > 10
        return
    with pytest.raises(ValueError, match="needs a GPU"):
        bench.check({"attention": "varlen"})


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("tile", [100, 300, 0])
def test_every_tile_is_right(tile: int, checkpointed: bool) -> None:
    for dtype in DTYPES:
        assert MlpBench(case(dtype, checkpointed=checkpointed)).check({"mlp_tile_tokens": tile}) <= 2


def test_a_tile_that_lies_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_tile_lost(mlp: Any, tile: int) -> None:
        whole = mlp.forward
        mlp.forward = lambda x: torch.cat([whole(x[:, :-tile]), whole(x[:, -tile:].detach())], 1)

    monkeypatch.setattr(mlp_bench, "tile_mlps", last_tile_lost)
    assert MlpBench(case()).check({"mlp_tile_tokens": 100}) > 10


def test_the_benches_of_all_groups_run_and_take_time() -> None:
    made = benches(case("bfloat16").as_json() | {"index": 0})
    assert set(made) == set(GROUPS)
    for name in GROUPS:
        made[name].prepare()
        assert 0 < made[name].seconds({"threads": 1}) < 30
    assert "attention" not in benches(case(heads=0).as_json()) and "mlp" not in benches(case(intermediate=0).as_json())


def test_options_hold_for_a_run_alone() -> None:
    threads = torch.get_num_threads()
    with using({"threads": threads + 1, "cpu_gemms": "fp32"}):
        assert torch.get_num_threads() == threads + 1 and cpu_gemms() == "fp32"
    assert torch.get_num_threads() == threads and cpu_gemms() == "auto"


def test_the_preference_decides_how_a_cpu_multiplies_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemms, "_has_bf16_cpu", lambda: True)
    small = torch.zeros(8, 4, dtype=torch.bfloat16)
    assert type(gemms.choose(small, 3)) is gemms.Upcast
    former = prefer_cpu_gemms("bf16")
    try:
        assert type(gemms.choose(small, 3)) is not gemms.Upcast
        prefer_cpu_gemms("fp32")
        assert gemms.choose(small, 1 << 40) == gemms.Upcast(torch.float32)
    finally:
        prefer_cpu_gemms(former)
    with pytest.raises(ValueError, match="choose one of"):
        prefer_cpu_gemms("fp16")


def model(**settings: Any) -> ModelConfig:
    return ModelConfig(path="m", **settings)


def names(group: str, shapes: Case, **settings: Any) -> list[str]:
    return [each.name for each in candidates(shapes, model(**settings), 6, group, {})]


def test_every_open_setting_has_candidates_and_an_explicit_one_has_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    on_gpu = case("bfloat16", head_tokens=32768, mlp_tokens=32768, vocab=152064)
    object.__setattr__(on_gpu, "device", "cuda")
    assert names("attention", on_gpu)[:1] == ["auto"] and {"flash", "varlen", "sdpa"} < set(names("attention", on_gpu))
    assert names("attention", on_gpu, attention="varlen") == ["varlen"]
    assert names("head", on_gpu) == ["auto, auto", "triton", "native", "torch", "auto, lean"]
    no_bonus = case("bfloat16", entropy=False)
    assert "quack" not in names("head", no_bonus)
    object.__setattr__(no_bonus, "device", "cuda")
    assert names("head", no_bonus) == ["auto, auto", "triton", "quack", "native", "torch", "auto, lean"]
    assert names("head", on_gpu, head_impl="torch", head_preset="fast") == ["torch, fast"]
    # 16384 rows of this vocabulary are 10 GB.
    assert names("chunk", on_gpu) == ["by size", "1024 rows", "2048 rows", "4096 rows", "8192 rows"]
    assert names("chunk", on_gpu, head_chunk_rows=77) == ["77 rows"]
    assert names("mlp", on_gpu, mlp_tile_tokens="auto")[0] == "tiles of 16384"
    assert len(names("mlp", on_gpu, mlp_tile_tokens="auto")) == 4
    assert names("mlp", on_gpu) == ["tiles of 16384"] and names("mlp", on_gpu, mlp_tile_tokens=0) == ["whole rows"]
    assert names("threads", on_gpu) == names("gemms", on_gpu) == []
    assert names("threads", case()) == ["6", "4", "3", "2", "1"]
    assert names("gemms", case("bfloat16")) == ["by size", "bf16", "fp32"] and names("gemms", case()) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert names("threads", case()) == ["6"]


def test_the_settings_name_all_implementations_of_the_head() -> None:
    named = set(ModelConfig.model_fields["head_impl"].annotation.__args__)
    assert named == set(IMPLS) - {"reference"}
    assert {"impl", "preset", "chunk_rows"} <= set(HeadOptions.__dataclass_fields__)


def test_documents_fill_the_row() -> None:
    assert documents(case()) == [150] * 5 + [27] and sum(documents(case(document=777))) == 777
    assert attention_bench._sequence(9).packed_tokens == 9
