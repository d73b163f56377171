"""Mixture of experts: the load-balancing loss is that of transformers, whatever the packing; statistics by hand.

Gradients of architectures with experts, soft caps, sinks and sliding windows equal those of each sequence alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from benchmarks.architectures.cases import CASES, VOCAB, Case
from benchmarks.architectures.check import write_checkpoint
from or1.config import ModelConfig, OptimConfig
from or1.core.errors import ModelError
from or1.core.types import TrainSequence
from or1.dist.oom_retry import RowBudget
from or1.model.load import load_model
from or1.model.routers import routers_of
from or1.train.metrics import UpdateStats
from or1.train.optim import MasterAdamW
from or1.train.rank_rows import Policy
from or1.train.update import update

BY_NAME = {case.name: case for case in CASES}
COEF = 0.7


def sequences_of(seed: int = 0) -> list[TrainSequence]:
    random = np.random.default_rng(seed)
    made = []
    for _ in range(6):
        prompt, response = (random.integers(3, VOCAB, n, dtype=np.int32) for n in random.integers(3, 12, 2))
        made.append(TrainSequence(prompt, response, np.zeros(len(response), np.float32), float(random.normal())))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    made = {}

    def of(case: Case) -> Path:
        if case.name not in made:
            made[case.name] = tmp_path_factory.mktemp(case.name)
            write_checkpoint(case, made[case.name])
        return made[case.name]

    return of


def dtype_of(path: Path) -> str:
    """Return the type of the model. torch has no grouped matrix product in fp64 on a CPU, which experts need."""
    name = json.loads((path / "config.json").read_text())["model_type"]
    return "float32" if "experts" in BY_NAME[name].note else "float64"


def gradient(path: Path, coef: float, max_tokens: int = 64, checkpointing: str = "none") -> tuple[dict, dict]:
    """Return the gradient and the metrics of one update."""
    settings = ModelConfig(path=str(path), dtype=dtype_of(path), device="cpu", gradient_checkpointing=checkpointing)
    model, seen, stats = load_model(settings).train(), {}, UpdateStats()
    optimizer = MasterAdamW(model, OptimConfig(grad_clip=1e30))
    step = optimizer.step_if_finite

    def keep(loss):
        seen.update({name: grad.clone() for name, grad in optimizer.gradients().items()})
        return step(loss)

    optimizer.step_if_finite = keep
    policy = Policy(model, RowBudget(max_tokens), routers=routers_of(model, coef))
    assert update(policy, optimizer, sequences_of(), 0.0, stats)
    return seen, stats.metrics()


def alone(path: Path, coef: float) -> tuple[dict, list]:
    """Return the gradient of transformers' own model, a padded row a sequence, and its router logits with a mask."""
    dtype = getattr(torch, dtype_of(path))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    sequences, losses, logits, masks = sequences_of(), [], [], []
    total = sum(len(s.response_ids) for s in sequences)
    for s in sequences:
        ids = torch.tensor(np.concatenate([s.prompt_ids, s.response_ids]), dtype=torch.int64)[None]
        extra = {"output_router_logits": True} if coef else {}
        output = model(input_ids=ids, use_cache=False, **extra)
        logp = output.logits[0].log_softmax(-1)[len(s.prompt_ids) - 1 : -1]
        losses.append(-s.advantage * logp.gather(1, ids[0, len(s.prompt_ids) :, None]).sum() / total)
        if coef:
            logits.append(output.router_logits)
            mask = torch.zeros(ids.shape[1])
            mask[len(s.prompt_ids) - 1 : -1] = 1
            masks.append(mask)
    loss = torch.stack(losses).sum()
    if coef:
        layers = tuple(torch.cat(each) for each in zip(*logits, strict=True))
        mask = torch.cat(masks)[None]
        experts = layers[0].shape[-1]
        loss = loss + coef * load_balancing_loss_func(layers, experts, model.config.num_experts_per_tok, mask)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, [logits, masks]


def assert_equal(ours: dict, theirs: dict, bound: float) -> None:
    assert ours.keys() >= theirs.keys() and theirs
    for name, grad in theirs.items():
        scale = max(float(grad.norm()), 1e-6)
        assert float((ours[name] - grad).norm()) <= bound * scale, name


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_the_balancing_loss_is_that_of_transformers(folder, name: str) -> None:
    ours, _ = gradient(folder(BY_NAME[name]), COEF)
    theirs, _ = alone(folder(BY_NAME[name]), COEF)
    # transformers sums the probabilities in fp32.
    assert_equal(ours, theirs, 1e-5)
    without, _ = gradient(folder(BY_NAME[name]), 0.0)
    gate = next(key for key in ours if "gate.weight" in key)
    assert float((ours[gate] - without[gate]).norm()) > 1e-2 * float(without[gate].norm()), "the loss has a gradient"


def test_the_balancing_loss_depends_neither_on_packing_nor_on_checkpointing(folder) -> None:
    path = folder(BY_NAME["qwen3_moe"])
    whole, metrics = gradient(path, COEF, max_tokens=400)
    for max_tokens, checkpointing in ((24, "none"), (24, "layer"), (60, "selective")):
        other, again = gradient(path, COEF, max_tokens, checkpointing)
        assert_equal(other, whole, 1e-5)
        assert [again[key] for key in again if key.startswith("router/")] == pytest.approx(
            [metrics[key] for key in metrics if key.startswith("router/")]
        )


def test_the_statistics_of_routers_by_hand(folder) -> None:
    path = folder(BY_NAME["qwen3_moe"])
    _, metrics = gradient(path, 0.0)
    _, (logits, masks) = alone(path, COEF)
    entropies, loads = [], []
    for layer in range(len(logits[0])):
        rows = torch.cat([each[layer][mask.bool()].detach() for each, mask in zip(logits, masks, strict=True)])
        probability = rows.softmax(-1)
        entropies.append(float(-(probability * probability.log()).sum(-1).mean()))
        counts = torch.bincount(probability.topk(2).indices.flatten(), minlength=4).double()
        loads.append(counts / counts.sum())
    assert metrics["router/entropy"] == pytest.approx(np.mean(entropies), rel=1e-6)
    assert metrics["router/load_max"] == pytest.approx(np.mean([float(load.max()) * 4 for load in loads]))
    assert metrics["router/unused"] == np.mean([float((load == 0).double().mean()) for load in loads])


@pytest.mark.parametrize("case", [case for case in CASES if "experts" in case.note], ids=lambda case: case.name)
def test_the_routers_of_every_architecture_are_found(case: Case) -> None:
    from transformers import CONFIG_MAPPING

    from benchmarks.architectures.cases import SHAPE

    if case.name == "llama4_text":
        pytest.skip("does not train")
    with torch.device("meta"):
        config = CONFIG_MAPPING[case.name](**(SHAPE if case.common else {}) | case.settings)
        model = AutoModelForCausalLM.from_config(config)
    assert routers_of(model, None) is not None


def test_a_coefficient_comes_from_the_checkpoint_or_is_refused(folder) -> None:
    model = load_model(ModelConfig(path=str(folder(BY_NAME["qwen3_moe"])), dtype="float32", device="cpu"))
    assert routers_of(model, None).coef == 0.0
    model.config.output_router_logits = True
    assert routers_of(model, None).coef == model.config.router_aux_loss_coef
    dense = load_model(ModelConfig(path=str(folder(BY_NAME["qwen2"])), dtype="float32", device="cpu"))
    assert routers_of(dense, None) is None
    with pytest.raises(ModelError, match="defines no load-balancing loss for 'qwen2'; remove the setting"):
        routers_of(dense, 0.1)


LISTED = ("mistral", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "olmo3", "granite", "smollm3", "gpt_oss")
WITH_EXPERTS = ("qwen3_moe", "mixtral", "deepseek_v3")


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTED + WITH_EXPERTS)
def test_gradients_in_packed_rows_are_those_of_each_sequence_alone(folder, name: str) -> None:
    path = folder(BY_NAME[name])
    ours, _ = gradient(path, 0.0)
    theirs, _ = alone(path, 0.0)
    # Some architectures compute their norms or routers in fp32, whatever the type of the model.
    assert_equal(ours, theirs, 1e-4)
