"""What `grad_row_eps` leaves out on a real policy: rows, time saved, the proven bound and the true error.

The loss is the on-policy clipped loss, without and with an entropy bonus. The truth is plain torch in fp64.
Legend: N rows, C rows of a chunk, H hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.lib import measure
from benchmarks.lib.problems import OBJECTIVE, Problem, task_loss
from benchmarks.real.heads import CPU
from benchmarks.real.inputs import Inputs
from or1_kernels import linear_policy_loss, reference

EPS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
TASKS = ("policy, no entropy", "policy")
_CHUNK = 64


class Exact(NamedTuple):
    """fp64 results: L1 norm of dloss/dlogits of each row [N], dhidden [N, H], dweight [V, H], 1 - p of the target [N].

    dlogits are with respect to the head's raw logits.
    """

    l1: Tensor
    dhidden: Tensor
    dweight: Tensor
    rest: Tensor


class Kept(NamedTuple):
    """Results of or1's head: which rows have a gradient [N], the bound, dhidden [N, H], dweight [V, H]."""

    used: Tensor
    left_out: float
    dhidden: Tensor
    dweight: Tensor


def live(problem: Problem) -> Problem:
    """Return the problem's live rows as one document, with their own advantages and weights."""
    names = ("hidden", "targets", "advantages", "token_weight", "old_logp")
    return replace(problem, masked=0.0, documents=1, **{name: getattr(problem, name)[problem.live] for name in names})


def exact(problem: Problem, task: str) -> Exact:
    """Return the fp64 gradient of a problem whose rows are all live, by autograd, a chunk of rows at a time."""
    hidden_NH, weight_VH = problem.hidden.double(), problem.weight.double()
    l1, dhidden, rest = [], [], []
    dweight_VH = torch.zeros_like(weight_VH)
    for index_C in torch.arange(len(hidden_NH)).split(_CHUNK):
        z_CV = (hidden_NH[index_C] @ weight_VH.T).requires_grad_()
        logp_C, entropy_C = reference.logprob_entropy(z_CV, problem.targets[index_C])
        task_loss(_rows(problem, index_C), task, logp_C, entropy_C).backward()
        dz_CV = z_CV.grad
        assert dz_CV is not None
        l1.append(dz_CV.abs().sum(1))
        dhidden.append(dz_CV @ weight_VH)
        dweight_VH += dz_CV.T @ hidden_NH[index_C]
        rest.append(-logp_C.detach().expm1())
    return Exact(torch.cat(l1), torch.cat(dhidden), dweight_VH, torch.cat(rest))


def head(problem: Problem, task: str, eps: float | None) -> Kept:
    """Return the gradients of or1's head with this grad_row_eps."""
    hidden, weight = (x.detach().requires_grad_() for x in (problem.hidden, problem.weight))
    loss, stats = linear_policy_loss(
        hidden,
        weight,
        problem.targets,
        problem.advantages,
        token_weight=problem.token_weight,
        old_logp=problem.old_logp,
        objective=OBJECTIVE,
        entropy_coef=problem.entropy_coef(task),
        grad_row_eps=eps,
    )
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    left_out = 0.0 if stats.left_out is None else float(stats.left_out)
    return Kept(hidden.grad.any(1), left_out, hidden.grad, weight.grad)


def rows(
    name: str,
    given: Inputs,
    section: str,
    tokens: int | None = None,
    *,
    task: str = TASKS[0],
    rounds: int = 6,
    eps: Sequence[float] = EPS,
) -> list[dict[str, Any]]:
    """Return one row an eps, in fp32: rows left out, bound and truth of what they weigh, error and CPU seconds.

    "bound" and "true" are the L1 norm of the left-out part of dloss/dlogits, in parts of the whole gradient's L1 norm.
    "dhidden" and "dweight" are errors in the Frobenius norm, relative to the whole gradient. "exact_*" are the head's
    errors without grad_row_eps.
    """
    problem = live(given.problem(section, tokens))
    want = exact(problem, task)
    whole = float(want.l1.sum())
    found: dict[float | None, Kept] = {}

    def call(e: float | None) -> Callable[[], None]:
        return lambda: found.update({e: head(problem, task, e)})

    fns = {str(e): call(e) for e in (None, *eps)}
    times = measure.interleaved(fns, CPU, rounds, warmup=0, timer=measure.cpu_seconds)
    plain, base = found[None], min(times["None"])
    made = []
    for e in eps:
        got = found[e]
        dropped = ~got.used
        made.append(
            {"policy": name, "section": section, "task": task, "rows": len(dropped), "eps": e}
            | {"rows_left_out": int(dropped.sum()), "share_left_out": float(dropped.float().mean())}
            | {"elements_left_out": int(dropped.sum()) * len(problem.weight)}
            | {"bound": got.left_out / whole, "true": float(want.l1[dropped].sum()) / whole}
            | {"dhidden": _off(got.dhidden, want.dhidden), "dweight": _off(got.dweight, want.dweight)}
            | {"exact_dhidden": _off(plain.dhidden, want.dhidden), "exact_dweight": _off(plain.dweight, want.dweight)}
            | {"cpu_s": min(times[str(e)]), "cpu_s_all_rows": base, "saved": 1 - min(times[str(e)]) / base}
            | {"nats": -float(problem.old_logp.mean()), "median_rest": float(want.rest.median())}
        )
    return made


def _off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def _rows(problem: Problem, index: Tensor) -> Any:
    names = ("targets", "advantages", "token_weight", "old_logp")
    return SimpleNamespace(**{name: getattr(problem, name)[index] for name in names})
