"""Shared inputs and measures of the kernel tests.

Legend: N rows, H hidden, V vocab.
"""

import os
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from or1_kernels import PolicyObjective, linear_logprob_entropy, linear_policy_loss, reference
from tests.helpers.objectives import OBJECTIVES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With OR1_TEST_EVERY = n, keep the first case of each test and every n-th after that.

    Triton's interpreter is slow.
    """
    every, seen, kept = int(os.environ.get("OR1_TEST_EVERY", "1")), Counter(), []
    for item in items:
        name = item.nodeid.partition("[")[0]
        if seen[name] % every == 0:
            kept.append(item)
        seen[name] += 1
    items[:] = kept


@dataclass(frozen=True)
class Case:
    """Inputs of one policy loss; `options` go to linear_policy_loss as they are."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    options: dict

    def to(self, dtype: torch.dtype) -> "Case":
        """Return hidden, weight and bias in dtype; constants are fp64 for fp64, otherwise unchanged."""
        constants = torch.float64 if dtype == torch.float64 else torch.float32
        options = {
            k: v.to(dtype if k == "bias" else constants) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in self.options.items()
        }
        return Case(self.hidden.to(dtype), self.weight.to(dtype), self.targets, self.advantages.to(constants), options)

    def with_options(self, **options) -> "Case":
        return replace(self, options=self.options | options)

    def rows(self, index) -> "Case":
        """Return the rows picked by an index tensor or slice."""
        n = self.targets.shape[0]
        options = {
            k: v[index] if isinstance(v, Tensor) and v.shape == (n,) and k != "bias" else v
            for k, v in self.options.items()
        }
        return Case(self.hidden[index], self.weight, self.targets[index], self.advantages[index], options)


def make_case(n: int, h: int, v: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> Case:
    """Peaked rows as a trained policy gives them: the target is sampled from the row's own distribution."""
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=gen).to(dtype)
    weight = (torch.randn(v, h, generator=gen) * 4 / h**0.5).to(dtype)
    z = (hidden.float() @ weight.float().T).softmax(-1)
    targets = torch.multinomial(z, 1, generator=gen)[:, 0] if n else torch.zeros(0, dtype=torch.int64)
    logp = z.gather(1, targets[:, None])[:, 0].log()
    noise = torch.randn(3, n, generator=gen) * 0.25
    base = {
        "token_weight": (torch.rand(n, generator=gen) > 0.2).float() / max(n, 1),
        "old_logp": logp + noise[0],
        "rollout_logp": logp + noise[1],
        "ref_logp": logp + noise[2],
        "entropy_coef": 0.01,
        "sequences": torch.arange(n) // 7,
    }
    return Case(hidden, weight, targets, torch.randn(n, generator=gen), base | options)


def policy(case: Case, needs=(True, True), **options) -> SimpleNamespace:
    """Run linear_policy_loss and its backward: loss, stats, dhidden, dweight."""
    hidden, weight = case.hidden.detach().requires_grad_(needs[0]), case.weight.detach().requires_grad_(needs[1])
    loss, stats = linear_policy_loss(hidden, weight, case.targets, case.advantages, **case.options, **options)
    if any(needs):
        loss.backward()
    return SimpleNamespace(
        loss=loss.detach(),
        logp=stats.logp,
        entropy=stats.entropy,
        ratio=stats.ratio,
        clipped=stats.clipped,
        dhidden=hidden.grad,
        dweight=weight.grad,
    )


def plain(case: Case) -> SimpleNamespace:
    """Return the results of plain torch: full logits in the inputs' dtype, autograd."""
    o = dict(case.options)
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
    z = reference.logits(
        hidden,
        weight,
        temperature=o.get("temperature", 1.0),
        bias_V=o.get("bias"),
        softcap=o.get("softcap"),
        logit_scale=o.get("logit_scale", 1.0),
    )
    logp, entropy = reference.logprob_entropy(z, case.targets)
    names = ("old_logp", "rollout_logp", "ref_logp")
    loss, _ = reference.policy_loss(
        logp,
        entropy,
        case.advantages,
        token_weight_N=o["token_weight"],
        entropy_coef=o["entropy_coef"],
        objective=o.get("objective") or PolicyObjective(),
        sequences_N=torch.where(o["token_weight"] == 0, -1, o["sequences"]),
        **{f"{n}_N": o.get(n) for n in names},
    )
    loss.backward()
    return SimpleNamespace(
        loss=loss.detach(), logp=logp.detach(), entropy=entropy.detach(), dhidden=hidden.grad, dweight=weight.grad
    )


def score(case: Case, upstream, **options) -> SimpleNamespace:
    """Run linear_logprob_entropy and its backward with upstream = (dL/dlogp, dL/dentropy)."""
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
    outs = linear_logprob_entropy(hidden, weight, case.targets, **options)
    torch.autograd.backward(outs, [u.to(outs[0].dtype) for u in upstream])
    return SimpleNamespace(logp=outs[0].detach(), entropy=outs[1].detach(), dhidden=hidden.grad, dweight=weight.grad)


def assert_as_exact(mine, peer, truth, names=("logp", "entropy", "dhidden", "dweight"), factor=2.0) -> None:
    """Error against fp64 at most `factor` times plain torch's, plus two units of rounding of the result's scale."""
    for name in names:
        got, same, want = (getattr(x, name) for x in (mine, peer, truth))
        assert got.shape == want.shape, name
        if not want.numel():
            continue
        floor = 2 * torch.finfo(got.dtype).eps * want.abs().max().item()
        for norm in (torch.inf, 2):
            error = torch.linalg.vector_norm(got.double() - want, norm).item()
            limit = factor * torch.linalg.vector_norm(same.double() - want, norm).item()
            floor_norm = floor if norm == torch.inf else floor * want.numel() ** 0.5 / 4
            assert error <= limit + floor_norm, f"{name}, {norm}-norm: {error:.3e} against fp64, limit {limit:.3e}"


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """Return the helpers above."""
    return SimpleNamespace(
        make_case=make_case,
        policy=policy,
        plain=plain,
        score=score,
        objectives=OBJECTIVES,
        assert_as_exact=assert_as_exact,
    )


@pytest.fixture(params=["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["torch", "native"])
def impl(request) -> str:
    """Return each implementation of this machine; test_triton starts Triton's under its interpreter."""
    return request.param
