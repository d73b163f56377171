"""The public head: token log-probs, entropy and the policy loss straight from hidden states and the LM weight.

Legend: N rows (tokens that are scored), H hidden, V vocab.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, chunked, reference
from .backends import resolve
from .objective import PolicyObjective, check_inputs, token_loss
from .rows import RowStats, Transform


@dataclass(frozen=True)
class PolicyStats:
    """What the loss saw, a value a row, detached; f64 for fp64 inputs.

    logp f32[N] and entropy f32[N] in nats; ratio f32[N] = exp(logp - old_logp); clipped bool[N]: the clip changed
    this row's gradient (ppo_clip) or weight (cispo); impl: the implementation that ran.
    """

    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor
    impl: str


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row, in nats, both differentiable to any upstream gradient.

    hidden [N, H], weight [V, H], bias [V] or None, one dtype among them; targets i64[N]; temperature a float or
    f32[N]. Logits are softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature. Returns f32[N] twice, f64
    for fp64 inputs. Logits are recomputed in backward; nothing of size N * V is kept. Infinities and nans propagate.

    Raises TypeError (dtypes), ValueError (shapes, temperature, softcap), IndexError (a CPU target outside the
    vocabulary), RuntimeError (an explicit impl that cannot run).
    """
    checks.check_head(hidden, weight, targets, bias)
    checks.check_transform(softcap, logit_scale)
    inv_tau_N = checks.inverse_temperature(temperature, hidden, chunked.compute_dtype(hidden.dtype))
    if impl == "reference":
        z_NV = _reference_logits(hidden, weight, inv_tau_N, bias, Transform(logit_scale, softcap))
        return reference.logprob_entropy(z_NV, targets)
    settings = _settings(hidden, impl, Transform(logit_scale, softcap), chunk_rows)
    return _Score.apply(hidden, weight, bias, targets, inv_tau_N, settings)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    token_weight: Tensor,
    old_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    objective: PolicyObjective | None = None,
    entropy_coef: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, PolicyStats]:
    """(loss [], stats): sum over rows of token_weight * (objective - entropy_coef * entropy), gradients included.

    Shapes as in linear_logprob_entropy; advantages, token_weight and the three log-probs are f32[N] constants.
    token_weight is mask / denominator, so every normaliser is the caller's. old_logp None means on-policy: the ratio
    is 1 and the clip inert. objective None is PPO's clip with both bounds 0.2; see PolicyObjective. The gradients
    are made in this call and only scaled in backward: three GEMMs in all. N = 0 gives a loss of 0 that is
    connected to hidden and weight. A row of token_weight 0 costs as much as any other, and a nan in it is kept.

    Raises what linear_logprob_entropy raises, and ValueError when the objective needs a log-prob that is missing.
    """
    checks.check_head(hidden, weight, targets, bias)
    checks.check_transform(softcap, logit_scale)
    objective = objective or PolicyObjective()
    check_inputs(objective, rollout_logp, ref_logp)
    named = {"advantages": advantages, "token_weight": token_weight, "old_logp": old_logp,
             "rollout_logp": rollout_logp, "ref_logp": ref_logp}
    checks.check_rows(hidden.shape[0], named)
    acc = chunked.compute_dtype(hidden.dtype)
    constants = {name: None if x is None else x.detach().to(hidden.device, acc) for name, x in named.items()}
    rows = _PolicyRows(targets, checks.inverse_temperature(temperature, hidden, acc), objective, entropy_coef,
                       **constants)
    transform = Transform(logit_scale, softcap)
    if impl == "reference":
        return _reference_policy_loss(hidden, weight, bias, rows, transform)
    settings = _settings(hidden, impl, transform, chunk_rows)
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias))
    loss, *per_row = _PolicyLoss.apply(hidden, weight, bias, rows, settings, needs)
    return loss, PolicyStats(*per_row, impl=settings.backend.name)


def _settings(hidden_NH: Tensor, impl: str, transform: Transform, chunk_rows: int | None) -> chunked.Settings:
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; it must be at least 1, or None to choose by size")
    return chunked.Settings(transform, resolve(impl, hidden_NH.device, hidden_NH.dtype), chunk_rows)


@dataclass(frozen=True)
class _PolicyRows:
    """The per-row constants of one policy loss, in the compute dtype."""

    targets: Tensor
    inv_tau: Tensor
    objective: PolicyObjective
    entropy_coef: float | Tensor
    advantages: Tensor = field(kw_only=True)
    token_weight: Tensor = field(kw_only=True)
    old_logp: Tensor | None = field(kw_only=True)
    rollout_logp: Tensor | None = field(kw_only=True)
    ref_logp: Tensor | None = field(kw_only=True)

    def terms(self, logp_C: Tensor, c: slice = slice(None)) -> NamedTuple:
        """The objective's TokenLoss over rows c."""
        old, rollout, ref = (None if x is None else x[c] for x in (self.old_logp, self.rollout_logp, self.ref_logp))
        return token_loss(self.objective, logp_C, self.advantages[c], old_logp_N=old, rollout_logp_N=rollout,
                          ref_logp_N=ref)

    def slopes(self, c: slice, stats: RowStats) -> tuple[Tensor, Tensor]:
        """(dL/dlogp, dL/dentropy) of rows c."""
        weight_C = self.token_weight[c]
        return weight_C * self.terms(stats.logp_C, c).slope_N, -weight_C * self.entropy_coef


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, targets_N, inv_tau_N, settings):
        engine = chunked.Engine(weight_VH, bias_V, settings)
        stats = chunked.score(engine, hidden_NH, targets_N, inv_tau_N)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, inv_tau_N, *stats)
        ctx.settings = settings
        return stats.logp_C.clone(), stats.entropy_C.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_N, dentropy_N):
        hidden_NH, weight_VH, bias_V, targets_N, inv_tau_N, *stats = ctx.saved_tensors
        engine = chunked.Engine(weight_VH, bias_V, ctx.settings)
        engine.want_grads(hidden_NH, ctx.needs_input_grad[:3])
        slopes = (dlogp_N.contiguous(), dentropy_N.contiguous())
        grads = chunked.score_backward(engine, (hidden_NH, targets_N, inv_tau_N), RowStats(*stats), slopes)
        dtype = weight_VH.dtype
        outs = (grads.hidden_NH, grads.weight_VH, grads.bias_V)
        return *(None if x is None else x.to(dtype) for x in outs), None, None, None


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, rows, settings, needs):
        engine = chunked.Engine(weight_VH, bias_V, settings)
        if any(needs):
            engine.want_grads(hidden_NH, needs)
            stats = chunked.score_and_grads(engine, (hidden_NH, rows.targets, rows.inv_tau), rows.slopes)
        else:
            stats = chunked.score(engine, hidden_NH, rows.targets, rows.inv_tau)
        grads = engine.grads()
        ctx.save_for_backward(grads.hidden_NH, grads.weight_VH, grads.bias_V)
        ctx.dtype = weight_VH.dtype
        terms = rows.terms(stats.logp_C)
        loss = (rows.token_weight * (terms.loss_N - rows.entropy_coef * stats.entropy_C)).sum()
        per_row = (stats.logp_C, stats.entropy_C, terms.ratio_N, terms.clipped_N)
        ctx.mark_non_differentiable(*per_row)
        return loss, *per_row

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        return *(None if x is None else _scaled(x, dloss, ctx.dtype) for x in ctx.saved_tensors), None, None, None


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # Not in place: with retain_graph a second backward reads the same accumulator.
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _reference_logits(
    hidden_NH: Tensor, weight_VH: Tensor, inv_tau_N: Tensor, bias_V: Tensor | None, transform: Transform
) -> Tensor:
    acc = inv_tau_N.dtype
    return reference.logits(hidden_NH.to(acc), weight_VH.to(acc), temperature=1 / inv_tau_N,
                            bias_V=None if bias_V is None else bias_V.to(acc), softcap=transform.softcap,
                            logit_scale=transform.scale)


def _reference_policy_loss(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, rows: _PolicyRows, transform: Transform
) -> tuple[Tensor, PolicyStats]:
    z_NV = _reference_logits(hidden_NH, weight_VH, rows.inv_tau, bias_V, transform)
    logp_N, entropy_N = reference.logprob_entropy(z_NV, rows.targets)
    loss, terms = reference.policy_loss(
        logp_N, entropy_N, rows.advantages, token_weight_N=rows.token_weight, objective=rows.objective,
        entropy_coef=rows.entropy_coef, old_logp_N=rows.old_logp, rollout_logp_N=rows.rollout_logp,
        ref_logp_N=rows.ref_logp)
    per_row = (x.detach() for x in (logp_N, entropy_N, terms.ratio_N, terms.clipped_N))
    return loss, PolicyStats(*per_row, impl="reference")
