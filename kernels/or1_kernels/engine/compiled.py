"""The head as custom operators with fake kernels, so that torch.compile traces through the loss without a graph break.

Only traced code calls these. Operators take flat arguments: per-row constants are stacked, with their names.
Legend: N rows, P per-row constants, H hidden, V vocab.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..objective import PolicyObjective
from ..rows import RowStats, Transform, resolve
from . import chunked
from .policy import PolicyRows, policy_pass


def _settings(weight_VH: Tensor, transform: Transform, tuning: tuple[str, str, int | None]) -> chunked.Settings:
    impl, preset, chunk_rows = tuning
    backend = resolve(impl, weight_VH.device, weight_VH.dtype)
    return chunked.Settings(transform, backend, preset=preset, chunk_rows=chunk_rows)


def _dense(grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    # An operator cannot return None. An empty tensor means that the gradient is not needed.
    return [like.new_empty(0) if x is None else x for x in grads]


def _fake_grads(hidden_NH: Tensor, weight_VH: Tensor, dtype: torch.dtype, needs: Sequence[bool]) -> list[Tensor]:
    shapes = (hidden_NH.shape, weight_VH.shape, weight_VH.shape[:1])
    return [hidden_NH.new_empty(s if need else (0,), dtype=dtype) for s, need in zip(shapes, needs, strict=True)]


@torch.library.custom_op("or1::policy_loss", mutates_args=())
def policy_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    per_row_PN: Tensor,
    entropy_coef: Tensor,
    *,
    names: str,
    kind: str,
    low: float,
    high: float,
    kl_coef: float,
    is_cap: float | None,
    is_floor: float,
    is_mask: bool,
    scale: float,
    softcap: float | None,
    impl: str,
    preset: str,
    chunk_rows: int | None,
    eps: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run policy.policy_pass.

    Returns loss, logp, entropy, ratio, clipped, left_out, and three gradients in the parameters' dtype.
    """
    settings = _settings(weight_VH, Transform(scale, softcap), (impl, preset, chunk_rows))
    per_row = dict(zip(names.split(","), per_row_PN, strict=True))
    inputs = chunked.RowInputs(hidden_NH, targets_N, per_row.pop("inv_tau"))
    objective = PolicyObjective(kind, low, high, kl_coef, is_cap, is_floor, is_mask)
    engine = chunked.Engine(weight_VH, bias_V, settings, len(hidden_NH))
    rows = PolicyRows(objective=objective, entropy_coef=entropy_coef, grad_row_eps=eps, **per_row)
    out = policy_pass(engine, inputs, rows, (needs[0], needs[1], needs[2]))
    left_out = out.loss.new_zeros(()) if out.left_out is None else out.left_out
    # Results of an operator may not share memory with each other.
    logp, entropy, ratio, clipped = (x.clone() for x in (out.logp, out.entropy, out.ratio, out.clipped))
    dhidden, dweight, dbias = (x.to(weight_VH.dtype) for x in _dense(out.grads, hidden_NH))
    return out.loss, logp, entropy, ratio, clipped, left_out, dhidden, dweight, dbias


@policy_loss.register_fake
def _(hidden_NH, weight_VH, bias_V, targets_N, per_row_PN, entropy_coef, *, needs, **_):
    row_N, scalar = per_row_PN.new_empty(hidden_NH.shape[0]), per_row_PN.new_empty(())
    flags_N = torch.empty_like(row_N, dtype=torch.bool)
    rows = (row_N, torch.empty_like(row_N), torch.empty_like(row_N), flags_N)
    grads = _fake_grads(hidden_NH, weight_VH, weight_VH.dtype, needs)
    return scalar, *rows, torch.empty_like(scalar), *grads


def _policy_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.set_materialize_grads(False)  # Otherwise unused gradient slots become [V, H] zeros.
    ctx.save_for_backward(*output[-3:])
    ctx.needs = keyword_only_inputs["needs"]


def _policy_backward(ctx, dloss, *_):
    grads = (x * dloss.to(x.dtype) if need else None for x, need in zip(ctx.saved_tensors, ctx.needs, strict=True))
    return *grads, None, None, None


policy_loss.register_autograd(_policy_backward, setup_context=_policy_setup)


@torch.library.custom_op("or1::logprob_entropy", mutates_args=())
def logprob_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    inv_tau_N: Tensor,
    *,
    scale: float,
    softcap: float | None,
    impl: str,
    preset: str,
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run chunked.score. Returns logp, entropy, peak, log_norm, each [N]."""
    settings = _settings(weight_VH, Transform(scale, softcap), (impl, preset, chunk_rows))
    engine = chunked.Engine(weight_VH, bias_V, settings, len(hidden_NH))
    stats, _ = chunked.score(engine, chunked.RowInputs(hidden_NH, targets_N, inv_tau_N))
    return stats.logp_C, stats.entropy_C, stats.peak_C, stats.log_norm_C


@logprob_entropy.register_fake
def _(hidden_NH, weight_VH, bias_V, targets_N, inv_tau_N, **_):
    return tuple(torch.empty_like(inv_tau_N) for _ in range(4))


@torch.library.custom_op("or1::logprob_entropy_backward", mutates_args=())
def logprob_entropy_backward(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    inv_tau_N: Tensor,
    stats_and_slopes_6N: Tensor,
    *,
    scale: float,
    softcap: float | None,
    impl: str,
    preset: str,
    chunk_rows: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run chunked.score_backward. Returns three gradients in the parameters' dtype, empty where not needed."""
    settings = _settings(weight_VH, Transform(scale, softcap), (impl, preset, chunk_rows))
    engine = chunked.Engine(weight_VH, bias_V, settings, len(hidden_NH))
    inputs = chunked.RowInputs(hidden_NH, targets_N, inv_tau_N)
    stats, slopes = RowStats(*stats_and_slopes_6N[:4]), chunked.Slopes(*stats_and_slopes_6N[4:])
    slopes = engine.want_score_grads((needs[0], needs[1], needs[2]), slopes)
    stash: list[Tensor | None] = [None] * len(list(engine.chunks()))
    grads = chunked.score_backward(engine, inputs, stats, slopes, stash)
    dhidden, dweight, dbias = (x.to(weight_VH.dtype) for x in _dense(grads, hidden_NH))
    return dhidden, dweight, dbias


@logprob_entropy_backward.register_fake
def _(hidden_NH, weight_VH, bias_V, targets_N, inv_tau_N, stats_and_slopes_6N, *, needs, **_):
    return tuple(_fake_grads(hidden_NH, weight_VH, weight_VH.dtype, needs))


def _score_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)


def _score_backward(ctx, dlogp_N, dentropy_N, *_):
    *inputs, logp_N, entropy_N, peak_N, log_norm_N = ctx.saved_tensors
    slopes = (torch.zeros_like(logp_N) if x is None else x for x in (dlogp_N, dentropy_N))
    packed_6N = torch.stack((logp_N, entropy_N, peak_N, log_norm_N, *slopes))
    needs = list(ctx.needs_input_grad[:3])
    grads = logprob_entropy_backward(*inputs, packed_6N, needs=needs, **ctx.options)
    return *(x if need else None for x, need in zip(grads, needs, strict=True)), None, None


logprob_entropy.register_autograd(_score_backward, setup_context=_score_setup)
