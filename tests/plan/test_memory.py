"""The plan's bytes are those of real tensors: exactly for what is counted by parameter, within 10 % for activations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig, PreTrainedModel, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from benchmarks.plan.tensor_bytes import row_loss, saved_bytes, storage_bytes
from or1.config import DistConfig, ModelConfig, OptimConfig
from or1.core.types import TrainSequence
from or1.model import selective
from or1.model.load import load_model
from or1.model.rows import Microbatch, pack_indexed
from or1.plan.activations import activations, layer_saved
from or1.plan.choices import Choices, choices_of
from or1.plan.devices import Device, find_device
from or1.plan.head import chunk_rows, head_buffers
from or1.plan.memory import gradient_bytes, kv_cache_bytes, optimizer_bytes, weight_bytes
from or1.plan.shapes import ModelShape, parse_shape, shape_of
from or1.train.optim import MasterAdamW
from or1_kernels.engine import chunked, wide
from or1_kernels.rows import TORCH, Transform

TINY = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
KINDS = {
    "qwen2": lambda: Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**TINY, head_dim=24, tie_word_embeddings=False),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **TINY, head_dim=24, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48, tie_word_embeddings=False
    ),
    "mixtral": lambda: MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**TINY, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
}
CPU = find_device("cpu", "auto")[0]


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=pytest.mark.slow) if kind == "mixtral" else kind for kind in KINDS]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(KINDS[request.param]()).save_pretrained(path)
    return str(path)


def choices(dtype: str, optim: OptimConfig | None = None, device: Device = CPU, **model: object) -> Choices:
    sections = SimpleNamespace(
        model=ModelConfig(path="x", dtype=dtype, device="cpu", **model), optim=optim or OptimConfig(), dist=DistConfig()
    )
    return choices_of(sections, device, gpus=1)


def load(path: str, dtype: str, **settings: object) -> PreTrainedModel:
    return load_model(ModelConfig(path=path, dtype=dtype, device="cpu", **settings)).train()


def row(*lengths: int, prompt: int = 5) -> Microbatch:
    rng = np.random.default_rng(0)

    def sequence(tokens: int) -> TrainSequence:
        ids = rng.integers(0, TINY["vocab_size"], tokens + 1).astype(np.int32)
        return TrainSequence(ids[:prompt], ids[prompt:], np.zeros(tokens + 1 - prompt, np.float32), 1.0)

    ((_, batch),) = pack_indexed([sequence(n) for n in lengths], sum(lengths))
    return batch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_gradients_and_optimizer_are_exact(folder: str, dtype: str) -> None:
    model, shape, planned = load(folder, dtype), shape_of(folder), choices(dtype)
    optimizer = MasterAdamW(model, OptimConfig())
    assert weight_bytes(shape, planned) == storage_bytes(model.parameters())
    assert list(shape.tensor_sizes()).count(0) == 0
    assert sorted(shape.tensor_sizes()) == sorted(p.numel() for p in model.parameters())

    from or1.model.forward import hidden_states

    batch = row(30, 20)
    row_loss(model, hidden_states(model, batch), batch, trained=10).backward()
    sums = optimizer.gradients().values() if hasattr(optimizer, "gradients") else [p.grad for p in model.parameters()]
    assert gradient_bytes(shape, planned) == storage_bytes(sums)

    optimizer.step_if_finite(torch.zeros(()))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    state = [t for t in optimizer.state_tensors().values() if t.untyped_storage().data_ptr() not in weights]
    assert optimizer_bytes(shape, planned) == storage_bytes(state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(384,), (100, 97, 95, 92)])
def test_saved_activations_without_checkpointing(folder: str, dtype: str, lengths: tuple[int, ...]) -> None:
    shape, planned = shape_of(folder), choices(dtype)
    real = saved_bytes(load(folder, dtype), row(*lengths))
    assert activations(shape, planned, sum(lengths)).saved == pytest.approx(real.layers, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_activations_with_checkpointed_layers(folder: str, dtype: str) -> None:
    shape, planned, batch = shape_of(folder), choices(dtype, gradient_checkpointing=True), row(200, 184)
    plan, real = activations(shape, planned, 384), saved_bytes(load(folder, dtype, gradient_checkpointing=True), batch)
    # The rotary tables are arguments of every checkpointed layer: held, but not as saved tensors.
    rotary = 2 * 384 * shape.head_dim * planned.weight
    assert plan.saved == real.layers + rotary
    # What a layer saves when it runs again: without checkpoints there are `layers` times that in place of its input.
    whole = saved_bytes(load(folder, dtype), batch).layers
    layer_input = 384 * TINY["hidden_size"] * planned.weight
    again = (whole - real.layers) / TINY["num_hidden_layers"] + layer_input
    assert plan.layer == layer_saved(shape, planned, 384) == pytest.approx(again, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_keeps_what_the_plan_says(folder: str, dtype: str) -> None:
    model, batch = load(folder, dtype), row(384)
    trained = len(batch.rows_N)
    planned = head_buffers(shape_of(folder), choices(dtype), CPU, trained)
    hidden = trained * TINY["hidden_size"] * choices(dtype).weight
    # The plan's `kept` has the picked hidden states too, which the head's caller holds; autograd saves their index.
    assert planned.kept - hidden == saved_bytes(model, batch).head - 8 * trained


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(("vocab", "rows"), [(160, 7), (160, 300_000), (152_064, 5000), (152_064, 34_816)])
def test_chunks_are_the_engines_own(vocab: int, rows: int, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # A weight on the meta device has a shape and no bytes; the engine asks it only for its shape and place.
    weight = torch.empty(vocab, 8, device="meta")
    engine = chunked.Engine(weight, None, chunked.Settings(Transform(), TORCH), rows)
    largest = max(c.stop - c.start for c in engine.chunks())
    if not on_gpu:
        assert chunk_rows(vocab, rows, 4, None) == largest
        return
    engine.weight_VH = SimpleNamespace(is_cuda=True, shape=weight.shape, device=torch.device("cuda", 0))
    monkeypatch.setattr(wide, "_machine", lambda device: (132, 80 << 30))
    chunks = list(engine.chunks())
    largest = max(c.stop - c.start for c in chunks)
    assert largest <= chunk_rows(vocab, rows, 4, 80 << 30) <= 8192
    assert (chunks[0].start, chunks[-1].stop) == (0, rows) and all(c.start % 128 == 0 for c in chunks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_is_exact(folder: str, dtype: str) -> None:
    from transformers import DynamicCache

    model, cache = load(folder, dtype).eval(), DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.randint(0, 160, (3, 11)), past_key_values=cache, use_cache=True)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert kv_cache_bytes(shape_of(folder), choices(dtype), 3 * 11) == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(
    ("hub_id", "parameters"),
    [
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", 32_763_876_352),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_known_models_have_their_published_sizes(hub_id: str, parameters: int, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert shape_of(hub_id).parameters == parameters


@pytest.mark.parametrize("hub_id", ["deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "Qwen/Qwen3-0.6B"])
def test_known_models_are_what_transformers_builds(hub_id: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from or1.plan.known_models import KNOWN

    fields = dict(KNOWN[hub_id])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    shape: ModelShape = parse_shape(KNOWN[hub_id], hub_id)
    assert sorted(shape.tensor_sizes()) == sorted(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_selective_checkpoints_keep_attention_outputs_too(folder: str, dtype: str) -> None:
    shape, batch = shape_of(folder), row(384)
    layer = activations(shape, choices(dtype, gradient_checkpointing=True), 384)
    plan = activations(shape, choices(dtype, gradient_checkpointing="selective"), 384)
    kept: dict[int, Tensor] = {}
    append = selective._alias

    def note(value: object) -> object:
        if isinstance(value, Tensor):
            kept[value.untyped_storage().data_ptr()] = value
        return append(value)

    model = load(folder, dtype, gradient_checkpointing="selective")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selective, "_alias", note)
        saved_bytes(model, batch)
    real = sum(t.untyped_storage().nbytes() for t in kept.values())
    # The kernel of the CPU keeps the log-sum-exp in fp32 for every dtype, as the GPU's do.
    assert plan.saved - layer.saved == real == layer.layer * shape.layers - plan.layer * shape.layers


def test_auto_is_planned_for_the_device(folder: str) -> None:
    gpu = find_device("H200", "auto")[0]
    assert choices("bfloat16", device=gpu).checkpointing == "selective"
    assert choices("bfloat16").checkpointing == "none"
    assert choices("bfloat16", device=gpu, gradient_checkpointing="offload").checkpointing == "offload"
