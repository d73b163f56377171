"""What the ranks of the tests here do; each function runs in every rank of a world, or alone."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from or1.config import DistConfig, ModelConfig, OptimConfig
from or1.core.types import Prompt, TrainSequence
from or1.dist.oom_retry import RowBudget
from or1.dist.world import World, join
from or1.model.load import load_model, load_tokenizer
from or1.model.shared_prompts import Sharing
from or1.rollout.engine import Sampling
from or1.rollout.hf import HfEngine
from or1.train.metrics import UpdateStats
from or1.train.optim import MasterAdamW
from or1.train.rank_rows import Policy
from or1.train.score import with_old_logp
from or1.train.update import update
from or1_kernels.objective import PolicyObjective


def whole(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().double().numpy()


def sequences_of(count: int, seed: int = 3) -> list[TrainSequence]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        fresh, response = (rng.integers(5, 19, n).astype(np.int32) for n in (rng.integers(2, 12), rng.integers(1, 40)))
        # Some prompts come twice, so that there is something to share.
        prompt = made[-1].prompt_ids if i % 3 == 1 else fresh
        logp = rng.normal(-2, 1, len(response)).astype(np.float32)
        made.append(TrainSequence(prompt, response, logp, float(rng.normal())))
    return made


class Probe(MasterAdamW):
    """Keeps the summed gradients that a step is given."""

    def step_if_finite(self, loss: torch.Tensor):
        named = zip(self.names, self.params, strict=True)
        sums = self.gradients()
        self.seen = {name: whole(p.grad if isinstance(p.grad, DTensor) else sums[name]) for name, p in named}
        return super().step_if_finite(loss)


ALPHA = 0.03


def policy_of(
    model: PreTrainedModel, world: World, sharing: Sharing = "off", budget: RowBudget | None = None
) -> Policy:
    return Policy(model, budget or RowBudget(96), 1.1, PolicyObjective(clip_high=0.28), sharing, world)


def one_update(
    path: Path,
    dtype: str,
    sequence_parallel: int,
    counts: list[int],
    checkpointing: bool = False,
    sharing: Sharing = "off",
    *,
    shard_ranks: int | None = None,
) -> list[dict]:
    """Return gradients and metrics of an update for each count of sequences, from the checkpoint's weights."""
    dist = DistConfig(sequence_parallel=sequence_parallel, timeout_s=60, shard_ranks=shard_ranks)
    with join(dist, torch.device("cpu")) as world:
        results = []
        for count in counts:
            config = ModelConfig(path=str(path), dtype=dtype, device="cpu", gradient_checkpointing=checkpointing)
            model = load_model(config, world).train()
            optimizer = Probe(model, OptimConfig(grad_clip=1e30), world)
            policy, stats = policy_of(model, world, sharing), UpdateStats()
            sequences = sequences_of(abs(count))
            if count < 0:
                sequences = with_old_logp(policy, sequences)
            assert update(policy, optimizer, sequences, ALPHA, stats)
            stats.reduce(world)
            results.append(
                {
                    "grads": optimizer.seen,
                    "metrics": stats.metrics(),
                    "weights": {n: whole(p) for n, p in model.named_parameters()},
                }
            )
        return results


def update_after_generation(path: Path, tokenizer: Path) -> dict[str, np.ndarray]:
    """Return the gradients of an update after only the main rank has generated responses."""
    with join(DistConfig(timeout_s=30), torch.device("cpu")) as world:
        model = load_model(ModelConfig(path=str(path), dtype="float32", device="cpu"), world).train()
        optimizer = Probe(model, OptimConfig(), world)
        prompts = [Prompt("made", "made", "", np.array([5, 6, 7], np.int32), ("0",))] if world.is_main else []
        engine = HfEngine(model, load_tokenizer(str(tokenizer)), batch_size=1)
        assert len(list(engine.generate(prompts, Sampling(1.0, 4, 3, 1)))) == 3 * len(prompts)
        assert update(policy_of(model, world), optimizer, sequences_of(13), ALPHA, UpdateStats())
        return optimizer.seen


def loaded(path: Path, dtype: str) -> dict[str, np.ndarray]:
    """Return parameters and buffers of a model as the ranks have loaded it."""
    with join(DistConfig(timeout_s=30), torch.device("cpu")) as world:
        model = load_model(ModelConfig(path=str(path), dtype=dtype, device="cpu"), world)
        tied = model.lm_head.weight is model.get_input_embeddings().weight
        assert tied == model.config.tie_word_embeddings
        alone = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        for one in (model, alone):
            one.config._attn_implementation = None
        assert model.config == alone.config and model.config.dtype == getattr(torch, dtype)
        assert model.generation_config == alone.generation_config and model.training == alone.training
        return {n: whole(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}


def memory_of_loading(path: Path) -> int:
    """Return the growth of this rank's peak memory, in bytes, while it loads a model."""
    with join(DistConfig(timeout_s=30), torch.device("cpu")) as world:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        load_model(ModelConfig(path=str(path), dtype="float32", device="cpu"), world)
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


MANY = 24


class OutOfMemoryOnce:
    """Raises at the given pass of a place, as a failed allocation would, and never again."""

    def __init__(self, model: PreTrainedModel, place: str | None):
        """Watch `place`, such as "layer 1 forward 2" or "head backward 1", the second or first pass; None: never."""
        if place is None:
            return
        name, self.kind, passes = place.rsplit(" ", 2)
        self.left = int(passes)
        module: nn.Module = model.lm_head if name == "head" else model.get_decoder().layers[int(name[-1])].mlp
        if self.kind == "forward":
            module.register_forward_pre_hook(lambda *_: self.count())
        else:
            module.register_forward_hook(lambda m, a, out: self.watch(out))

    def watch(self, out: torch.Tensor | tuple) -> None:
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            out.register_hook(lambda grad: self.count())

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def update_out_of_memory(
    model_config: ModelConfig,
    sequence_parallel: int,
    rows: tuple[int, int],
    failures: list[tuple],
    *,
    shard_ranks: int | None = None,
) -> list[dict]:
    """Old log-probs and an update in rows of rows[1]; then the same for each of `failures`.

    A failure is (phase, {rank: place}): rows of rows[0] in the phase "score" or "update", where a rank fails.
    """
    dist = DistConfig(sequence_parallel=sequence_parallel, timeout_s=30, shard_ranks=shard_ranks)
    with join(dist, torch.device("cpu")) as world:
        results = []
        for failing, places in [("", {}), *failures]:
            model = load_model(model_config, world).train()
            optimizer, stats, told = Probe(model, OptimConfig(lr=1e-3), world), UpdateStats(), []
            budgets = {phase: RowBudget(rows[phase != failing], message=told.append) for phase in ("score", "update")}
            policies = {phase: Policy(model, budget, 1.1, world=world) for phase, budget in budgets.items()}
            if failing == "score":
                OutOfMemoryOnce(model, places.get(world.rank))
            sequences = with_old_logp(policies["score"], sequences_of(MANY))
            if failing == "update":
                OutOfMemoryOnce(model, places.get(world.rank))
            assert update(policies["update"], optimizer, sequences, ALPHA, stats)
            stats.reduce(world)
            results.append(
                {
                    "grads": optimizer.seen,
                    "metrics": stats.metrics(),
                    "told": told,
                    "budgets": [budget.state_dict() for budget in budgets.values()],
                    "old_logp": {str(i): s.old_logp for i, s in enumerate(sequences)},
                    "weights": {n: whole(p) for n, p in model.named_parameters()},
                }
            )
        return results
