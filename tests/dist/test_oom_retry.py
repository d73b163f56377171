"""An update that runs out of memory starts again in rows of half the tokens, with the same gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from or1.config import ModelConfig, OptimConfig
from or1.core.errors import MemoryLimitError, RowMemoryError, ShorterRowsError
from or1.core.types import TrainSequence
from or1.dist.oom_retry import RowBudget
from or1.model.load import load_model
from or1.train.metrics import UpdateStats
from or1.train.optim import MasterAdamW
from or1.train.rank_rows import Policy
from or1.train.score import with_old_logp
from or1.train.update import update


def sequences_of(shapes: list[tuple[int, int]], seed: int = 0) -> list[TrainSequence]:
    rng = np.random.default_rng(seed)
    made = []
    for prompt, response in shapes:
        ids = rng.integers(5, 19, prompt + response).astype(np.int32)
        made.append(TrainSequence(ids[:prompt], ids[prompt:], rng.normal(-2, 1, response), float(rng.normal())))
    return made


SEQUENCES = sequences_of([(3, 20), (5, 9), (2, 30), (4, 4), (6, 17), (3, 12)])


def load(adder: Path, **options: object) -> PreTrainedModel:
    return load_model(ModelConfig(path=str(adder), dtype="float64", device="cpu", **options)).train()


class OutOfMemoryAt:
    """Raises from the forward of a module, as a failed allocation would, while a row has more than `limit` tokens."""

    def __init__(self, module: nn.Module, limit: int, call: int, error: RuntimeError):
        self.limit, self.call, self.seen, self.raised, self.error = limit, call, 0, 0, error
        module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.seen += 1
        if arguments[0].shape[-2] > self.limit and self.seen >= self.call:
            self.raised += 1
            raise self.error


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_out_of_memory_halves_the_row_and_gives_the_same_gradient(error: RuntimeError, where: str, adder: Path) -> None:
    def updated(limit: int | None) -> tuple[dict[str, Tensor], UpdateStats, RowBudget, list[str]]:
        model = load(adder, gradient_checkpointing="layer" if where == "backward" else "none")
        told: list[str] = []
        budget = RowBudget(64, message=told.append)
        if limit is not None:
            # Call 2 is the second row's forward; where backward runs the layer again, call 4 is the second row's
            # backward, after the layers above it have left their gradients.
            OutOfMemoryAt(model.get_decoder().layers[0].mlp, limit, 2 if where == "forward" else 4, error)
        optimizer, stats, seen = MasterAdamW(model, OptimConfig(lr=1e-3)), UpdateStats(), {}
        step = optimizer.step_if_finite
        optimizer.step_if_finite = lambda loss: (
            seen.update({n: g.clone() for n, g in optimizer.gradients().items()}),
            step(loss),
        )[1]
        assert update(Policy(model, budget), optimizer, SEQUENCES, 0.1, stats)
        return seen, stats, budget, told

    plain, plain_stats, _, _ = updated(None)
    found, stats, budget, told = updated(40)
    assert budget.max_tokens == 32 and budget.out_of_memory == 1
    assert len(told) == 1 and "64" in told[0] and "optim.max_tokens_per_rank = 32" in told[0]
    assert stats.tokens == plain_stats.tokens and stats.losses == pytest.approx(plain_stats.losses, rel=1e-11)
    for name, grad in plain.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-10 * grad.abs().max().item())


def test_a_row_never_becomes_shorter_than_the_longest_sequence(adder: Path) -> None:
    model = load(adder)
    longest = max(s.packed_tokens for s in SEQUENCES)
    OutOfMemoryAt(model.get_decoder().layers[0].mlp, longest - 1, 1, ERRORS[0])
    budget = RowBudget(100)
    with pytest.raises(MemoryLimitError, match=rf"row of {longest} tokens.*max_response_tokens"):
        update(Policy(model, budget), MasterAdamW(model, OptimConfig()), SEQUENCES, 0.0, UpdateStats())
    assert budget.max_tokens == longest and budget.out_of_memory == 2


def test_the_old_logp_pass_backs_off_too_and_the_budget_stays(adder: Path) -> None:
    model = load(adder)
    expected = with_old_logp(Policy(model, RowBudget(64)), SEQUENCES)
    budget = RowBudget(64)
    OutOfMemoryAt(model.get_decoder().layers[0].mlp, 40, 1, ERRORS[0])
    found = with_old_logp(Policy(model, budget), SEQUENCES)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.old_logp, theirs.old_logp, rtol=1e-10)
    resumed = RowBudget(64)
    resumed.load_state(budget.state_dict())
    assert (resumed.max_tokens, resumed.out_of_memory) == (32, 1)


def test_other_errors_are_not_taken_for_out_of_memory(adder: Path) -> None:
    model = load(adder)
    OutOfMemoryAt(model.get_decoder().layers[0].mlp, 0, 1, RuntimeError("shapes do not match"))
    budget = RowBudget(64)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        with_old_logp(Policy(model, budget), SEQUENCES)
    assert budget.out_of_memory == 0


def test_a_run_that_cannot_use_shorter_rows_reports_if_a_resume_could() -> None:
    caps: list[int] = []

    def fail(budget: RowBudget) -> None:
        for attempt in budget.attempts(longest=30):
            with attempt:
                raise RowMemoryError("rank 1: out of memory", here_only=True)

    with pytest.raises(ShorterRowsError, match=r"resumes with rows of 48.*rank 1"):
        fail(RowBudget(96, cap=caps.append))
    with pytest.raises(MemoryLimitError) as caught:
        fail(RowBudget(30, cap=caps.append))
    assert type(caught.value) is MemoryLimitError and "resumes" not in str(caught.value)
    assert caps == [48]
