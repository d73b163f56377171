"""The public head: token log-probs, entropy and the policy loss straight from hidden states and the LM weight.

Legend: N rows (tokens that are scored), M rows picked out of them, H hidden, V vocab.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, chunked, reference
from .compiled import logprob_entropy, policy_loss
from .objective import PolicyObjective, as_objective, check_inputs
from .options import HeadOptions, head_options
from .policy import PolicyRows, policy_pass
from .rows import RowStats


@dataclass(frozen=True)
class PolicyStats:
    """What the loss saw, a value a row, detached; f64 for fp64 inputs.

    logp f32[N] and entropy f32[N] in nats; ratio f32[N] = exp(logp - old_logp); clipped bool[N]: the clip changed
    this row's gradient (ppo_clip) or weight (cispo); impl: the implementation that ran. Rows left out by `rows` read
    0. left_out: with grad_row_eps, an upper bound on the L1 norm of the neglected part of dloss/dlogits, f32[].
    """

    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor
    impl: str
    left_out: Tensor | None = None


def linear_logprob_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row, in nats, both differentiable to any upstream gradient.

    hidden [N, H] and weight [V, H] of one dtype; targets i64[N]; options are the fields of HeadOptions (temperature,
    bias, softcap, logit_scale, impl, ...). Returns f32[N] twice, f64 for fp64 inputs. Logits are recomputed in
    backward unless stash_bytes keeps them. Infinities and nans propagate. Under no_grad one GEMM runs and nothing is
    kept.

    Raises TypeError (dtypes, an unknown option), ValueError (shapes, limits of HeadOptions), IndexError (a CPU
    target outside the vocabulary), RuntimeError (an explicit impl that cannot run).
    """
    head = head_options(options)
    if head.grad_row_eps is not None:
        raise ValueError("grad_row_eps is set, but it needs the loss; use linear_policy_loss")
    head.check(hidden, weight, targets)
    inputs = head.row_inputs(hidden, weight, targets)
    if head.impl == "reference":
        return reference.logprob_entropy(_reference_logits(inputs, weight, head), targets)
    if torch.compiler.is_compiling() and head.traceable():
        return logprob_entropy(hidden, weight, head.bias, inputs.targets, inputs.inv_tau, **head.scalars())[:2]
    return _eager_logprob_entropy(inputs, weight, head)


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
    objective: PolicyObjective | str | None = None,
    entropy_coef: float | Tensor = 0.0,
    rows: Tensor | str | None = None,
    **options: Any,
) -> tuple[Tensor, PolicyStats]:
    """(loss [], stats): sum over rows of token_weight * (objective - entropy_coef * entropy), gradients included.

    hidden, weight, targets and options as in linear_logprob_entropy; advantages, token_weight and the log-probs are
    f32[N] constants. token_weight is mask / denominator, so every normaliser is the caller's. old_logp None means
    on-policy: the ratio is 1 and the clip inert. objective None is PPO's clip with both bounds 0.2; a kind as text,
    such as "cispo", is PolicyObjective(kind=...) with its defaults. The gradients
    are made in this call and only scaled in backward: three GEMMs in all. N = 0 gives a loss of 0 that is connected
    to hidden and weight.
    rows, i64[M]: only these rows enter a GEMM; "live" picks those of token_weight != 0 (on a GPU the host waits for
    their number). None: all rows, and a nan in a row of weight 0 is kept.

    Raises what linear_logprob_entropy raises, and ValueError when the objective needs a log-prob that is missing.
    """
    head, objective = head_options(options), as_objective(objective)
    check_inputs(objective, rollout_logp, ref_logp)
    head.check(hidden, weight, targets)
    inputs = head.row_inputs(hidden, weight, targets)
    per_row = {
        "advantages": advantages,
        "token_weight": token_weight,
        "old_logp": old_logp,
        "rollout_logp": rollout_logp,
        "ref_logp": ref_logp,
    }
    per_row = checks.as_constants(per_row, like_N=inputs.inv_tau)
    index_M = _row_index(rows, per_row["token_weight"])
    if index_M is not None:
        inputs = inputs.rows(index_M)
        per_row = {name: None if x is None else x[index_M] for name, x in per_row.items()}
    constants = PolicyRows(objective, entropy_coef, head.grad_row_eps, **per_row)
    run = _reference_policy_loss if head.impl == "reference" else _fused_policy_loss
    loss, stats = run(inputs, weight, head, constants)
    return loss, _spread(stats, index_M, hidden.shape[0])


@dataclass(frozen=True)
class _ScoreCall:
    """What _Score needs beside the differentiable inputs."""

    targets_N: Tensor
    inv_tau_N: Tensor
    settings: chunked.Settings
    main_grad_VH: Tensor | None
    grad_enabled: bool


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, call):
        engine = chunked.Engine(weight_VH, bias_V, call.settings, len(hidden_NH))
        inputs = chunked.RowInputs(hidden_NH, call.targets_N, call.inv_tau_N)
        stats, ctx.stash = chunked.score(engine, inputs, may_stash=call.grad_enabled and any(ctx.needs_input_grad))
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, *stats)
        ctx.call = call
        return stats.logp_C.clone(), stats.entropy_C.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_N, dentropy_N):
        hidden_NH, weight_VH, bias_V, *stats = ctx.saved_tensors
        call = ctx.call
        engine = chunked.Engine(weight_VH, bias_V, call.settings, len(hidden_NH))
        engine.want_grads(ctx.needs_input_grad[:3], call.main_grad_VH)
        inputs = chunked.RowInputs(hidden_NH, call.targets_N, call.inv_tau_N)
        slopes = chunked.Slopes(dlogp_N.contiguous(), dentropy_N.contiguous())
        grads = chunked.score_backward(engine, inputs, RowStats(*stats), slopes, ctx.stash)
        dhidden, dweight, dbias = (None if x is None else x.to(weight_VH.dtype) for x in grads)
        return dhidden, None if call.main_grad_VH is not None else dweight, dbias, None


@dataclass(frozen=True)
class _PolicyCall:
    """What _PolicyLoss needs beside the differentiable inputs; needs: which of them want a gradient."""

    targets_N: Tensor
    inv_tau_N: Tensor
    settings: chunked.Settings
    rows: PolicyRows
    needs: tuple[bool, bool, bool]
    main_grad_VH: Tensor | None


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, call):
        engine = chunked.Engine(weight_VH, bias_V, call.settings, len(hidden_NH))
        inputs = chunked.RowInputs(hidden_NH, call.targets_N, call.inv_tau_N)
        loss, *per_row, grads = policy_pass(engine, inputs, call.rows, call.needs, call.main_grad_VH)
        ctx.save_for_backward(*grads)
        ctx.dtype, ctx.unit_upstream = weight_VH.dtype, call.main_grad_VH is not None
        ctx.mark_non_differentiable(*(x for x in per_row if x is not None))
        return loss, *per_row

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if ctx.unit_upstream:
            # Not a Python `if` on its value: a GPU's host would wait for it.
            torch._assert_async(
                dloss == 1,
                "main_grad already holds the weight's gradient for dloss = 1, but the "
                "loss was scaled; put the factor into token_weight",
            )
        return *(None if x is None else scaled(x, dloss, ctx.dtype) for x in ctx.saved_tensors), None


@torch.compiler.disable
def _eager_logprob_entropy(inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions) -> tuple[Tensor, Tensor]:
    settings, grad_on = head.settings(weight_VH), torch.is_grad_enabled()
    call = _ScoreCall(inputs.targets, inputs.inv_tau, settings, head.main_grad, grad_on)
    return _Score.apply(inputs.hidden, weight_VH, head.bias, call)


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor in `dtype`; in place where no second backward can read the accumulator, which saves a [V, H]."""
    if grad.dtype == dtype and not _graph_is_kept():
        return grad.mul_(factor)
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _graph_is_kept() -> bool:
    """Whether the backward under way was started with retain_graph; a torch that cannot tell counts as yes."""
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return probe is None or probe()


def _fused_policy_loss(
    inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions, rows: PolicyRows
) -> tuple[Tensor, PolicyStats]:
    grad_on, settings = torch.is_grad_enabled(), head.settings(weight_VH)
    needs = tuple(grad_on and x is not None and x.requires_grad for x in (inputs.hidden, weight_VH, head.bias))
    if torch.compiler.is_compiling() and head.traceable():
        loss, *per_row, left_out = _traced_policy_loss(inputs, weight_VH, head, rows, needs)
    else:
        loss, *per_row, left_out = _eager_policy_loss(inputs, weight_VH, head, rows, needs)
    return loss, PolicyStats(*per_row, settings.backend.name, None if head.grad_row_eps is None else left_out)


@torch.compiler.disable
def _eager_policy_loss(
    inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions, rows: PolicyRows, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    settings, grad_on = head.settings(weight_VH), torch.is_grad_enabled()
    call = _PolicyCall(inputs.targets, inputs.inv_tau, settings, rows, needs, head.main_grad if grad_on else None)
    return _PolicyLoss.apply(inputs.hidden, weight_VH, head.bias, call)


def _traced_policy_loss(
    inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions, rows: PolicyRows, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    per_row = {
        "inv_tau": inputs.inv_tau,
        "advantages": rows.advantages,
        "token_weight": rows.token_weight,
        "old_logp": rows.old_logp,
        "rollout_logp": rows.rollout_logp,
        "ref_logp": rows.ref_logp,
    }
    per_row = {name: x for name, x in per_row.items() if x is not None}
    coef = torch.as_tensor(rows.entropy_coef, dtype=inputs.inv_tau.dtype, device=weight_VH.device)
    o = rows.objective
    out = policy_loss(
        inputs.hidden,
        weight_VH,
        head.bias,
        inputs.targets,
        torch.stack(list(per_row.values())),
        coef,
        names=",".join(per_row),
        kind=o.kind,
        low=o.clip_low,
        high=o.clip_high,
        kl_coef=o.kl_coef,
        is_cap=o.is_cap,
        eps=head.grad_row_eps,
        needs=list(needs),
        **head.scalars(),
    )
    return out[0], *(x.detach() for x in out[1:6])


def _reference_policy_loss(
    inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions, rows: PolicyRows
) -> tuple[Tensor, PolicyStats]:
    logp_N, entropy_N = reference.logprob_entropy(_reference_logits(inputs, weight_VH, head), inputs.targets)
    loss, terms = reference.policy_loss(
        logp_N,
        entropy_N,
        rows.advantages,
        token_weight_N=rows.token_weight,
        objective=rows.objective,
        entropy_coef=rows.entropy_coef,
        old_logp_N=rows.old_logp,
        rollout_logp_N=rows.rollout_logp,
        ref_logp_N=rows.ref_logp,
    )
    per_row = (x.detach() for x in (logp_N, entropy_N, terms.ratio_N, terms.clipped_N))
    return loss, PolicyStats(*per_row, impl="reference")


def _reference_logits(inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions) -> Tensor:
    acc = inputs.inv_tau.dtype
    return reference.logits(
        inputs.hidden.to(acc),
        weight_VH.to(acc),
        temperature=1 / inputs.inv_tau,
        bias_V=None if head.bias is None else head.bias.to(acc),
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )


def _row_index(rows: Tensor | str | None, token_weight_N: Tensor) -> Tensor | None:
    if isinstance(rows, str):
        if rows != "live":
            raise ValueError(f"rows is {rows!r}; it must be a tensor of row indices, 'live' or None")
        return token_weight_N.nonzero()[:, 0]
    return rows


def _spread(stats: PolicyStats, index_M: Tensor | None, num_rows: int) -> PolicyStats:
    if index_M is None:
        return stats
    whole = (
        x.new_zeros(num_rows).index_copy_(0, index_M, x)
        for x in (stats.logp, stats.entropy, stats.ratio, stats.clipped)
    )
    return PolicyStats(*whole, stats.impl, stats.left_out)
